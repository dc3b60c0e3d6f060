"""What is told of a replica's work: the dashboard's file, the outcome of a call, its span."""

from __future__ import annotations

import asyncio
import json

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from deployments import dashboard, observer
from deployments.metrics import METRICS
from deployments.observer import ServiceObserver, observed
from deployments.problems import Problem
from plora_ray.errors import StoreError
from plora_ray.inference.batcher import QueueFull


def test_the_dashboards_file_is_the_one_that_is_generated_and_shows_every_metric() -> None:
    assert dashboard.FILE.read_text("utf-8") == dashboard.text(), "python -m deployments.dashboard writes it anew"
    panels = json.loads(dashboard.text())["panels"]
    for name, panel in zip(METRICS, panels, strict=True):
        assert panel["targets"] and all(f"ray_{name}" in target["expr"] for target in panel["targets"])


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, "ok"), (QueueFull("x"), "queue_full"), (TimeoutError(), "timeout"), (StoreError("x"), "unavailable"),
        (Problem(422, "x"), "refused"), (asyncio.CancelledError(), "client_gone"), (KeyError("x"), "failed"),
    ],
)  # fmt: skip
def test_a_call_is_told_of_once_with_its_outcome_and_is_a_span(
    error: BaseException | None, outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, str]] = []

    class Told(ServiceObserver):
        def on_call(self, call: str, outcome: str, seconds: float) -> None:
            told.append((call, outcome))

    spans, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    monkeypatch.setattr(observer, "_tracer", provider.get_tracer("test"))
    try:
        with observed(Told(), "adapt"):
            if error is not None:
                raise error
    except BaseException as raised:
        assert raised is error
    assert told == [("adapt", outcome)]
    (span,) = spans.get_finished_spans()
    assert span.name == "plora.adapt" and span.attributes == {"plora.outcome": outcome} and not span.events
