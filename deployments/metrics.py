"""A replica's metrics for Prometheus, through Ray's agents, which put `ray_` before the names. Labels never name a user.

METRICS is the list of all of them: the dashboard and its test are made from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from ray.util.metrics import Counter, Gauge, Histogram

from deployments.observer import Call, Outcome, ServiceObserver
from plora_ray.inference.observer import BatchDone, PopulationReason, Tier

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
TOKENS = (16.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0)
ROWS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)


@dataclass(frozen=True)
class Metric:
    """One metric; title and unit are the dashboard's."""

    kind: Literal["counter", "gauge", "histogram"]
    title: str
    description: str
    labels: tuple[str, ...] = ()
    unit: str = "short"
    boundaries: tuple[float, ...] = ()


METRICS: Mapping[str, Metric] = {
    "plora_calls_total": Metric(
        "counter", "Calls", "Calls of predict, adapt, erase and activate by their outcome", ("call", "outcome"), "reqps"
    ),
    "plora_call_seconds": Metric("histogram", "Time of a call", "Time of whole calls in the replica", ("call",), "s", SECONDS),
    "plora_stage_seconds": Metric(
        "histogram", "Time by stage", "queue: a text's wait for the model; pull: a user's fetch below memory; forward: a batch's pass",
        ("stage",), "s", SECONDS,
    ),
    "plora_batch_rows": Metric("histogram", "Texts of a batch", "Texts of a batch", (), "short", ROWS),
    "plora_batch_tokens": Metric("histogram", "Tokens of a batch", "Tokens of a batch, padding not counted", (), "short", TOKENS),
    "plora_batch_fill": Metric("histogram", "Fill of a batch", "Tokens by padded tokens of a batch", (), "percentunit", SHARES),
    "plora_lookups_total": Metric(
        "counter", "Adapters by tier", "Where texts found their adapter; store: a cold pull, unknown: a user remembered to have none",
        ("tier",), "reqps",
    ),
    "plora_population_total": Metric(
        "counter", "Population answers", "Texts answered by the population, by reason", ("reason",), "reqps"
    ),
    "plora_resident_users": Metric("gauge", "Resident users", "Users whose adapters this replica holds in memory for good"),
    "plora_generation_created_seconds": Metric(
        "gauge", "Age of the generation", "When the generation that answers was made, Unix time", (), "s"
    ),
}  # fmt: skip


class ServingMetrics(ServiceObserver):
    """Exports what it is told. One a process: Ray joins metrics of one name."""

    def __init__(self) -> None:
        self._metrics: dict[str, Any] = {name: _created(name, metric) for name, metric in METRICS.items()}

    def on_call(self, call: Call, outcome: Outcome, seconds: float) -> None:
        self._metrics["plora_calls_total"].inc(1, {"call": call, "outcome": outcome})
        self._metrics["plora_call_seconds"].observe(seconds, {"call": call})

    def on_generation(self, created_at: str) -> None:
        self._metrics["plora_generation_created_seconds"].set(datetime.fromisoformat(created_at).timestamp())

    def on_lookups(self, tier: Tier, rows: int) -> None:
        if rows:
            self._metrics["plora_lookups_total"].inc(rows, {"tier": tier})

    def on_pull(self, seconds: float) -> None:
        self._metrics["plora_stage_seconds"].observe(seconds, {"stage": "pull"})

    def on_batch(self, batch: BatchDone) -> None:
        for waited_s in batch.queue_s:
            self._metrics["plora_stage_seconds"].observe(waited_s, {"stage": "queue"})
        self._metrics["plora_stage_seconds"].observe(batch.forward_s, {"stage": "forward"})
        self._metrics["plora_batch_rows"].observe(batch.rows)
        self._metrics["plora_batch_tokens"].observe(batch.tokens)
        self._metrics["plora_batch_fill"].observe(batch.tokens / batch.padded_tokens)

    def on_population(self, reason: PopulationReason, rows: int) -> None:
        self._metrics["plora_population_total"].inc(rows, {"reason": reason})

    def on_resident(self, users: int) -> None:
        self._metrics["plora_resident_users"].set(users)


def _created(name: str, metric: Metric) -> Any:
    if metric.kind == "histogram":
        return Histogram(name, metric.description, boundaries=list(metric.boundaries), tag_keys=metric.labels)
    return {"counter": Counter, "gauge": Gauge}[metric.kind](name, metric.description, tag_keys=metric.labels)
