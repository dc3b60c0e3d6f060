"""The end of a run: its report, the committed generation, and no trace of users' texts left behind."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from plora_ray.adapters.labels import LabelSpace
from plora_ray.data.stats import PartitionStats
from plora_ray.data.synthetic import SyntheticParams, ceilings
from plora_ray.errors import StoreError
from plora_ray.evaluation.metrics import (
    as_json,
    classification_scores,
    label_prior_log_probabilities,
    log_softmax,
    paired,
    regression_scores,
    row_nll,
)
from plora_ray.store import AdapterStore
from plora_ray.store.manifest import ModelRef
from plora_ray.training.rank import KIND, Assignment
from plora_ray.training.run_state import RunState, WaveOutcome


@dataclass(frozen=True)
class Published:
    """The job's last line on standard output."""

    generation: str
    users: int
    examples: int
    store: str
    report: str
    seconds: float

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "seconds": round(self.seconds, 1)})


def publish(
    store: AdapterStore, run: RunState, assignment: Assignment, stats: PartitionStats, weight_hash: str, *, seconds: float
) -> Published:
    """Commit the generation if it isn't yet, make it current, delete the run's folder.

    Raises StoreError, with nothing published, if a planned wave is missing or holds other users than were planned.
    """
    manifest = store.manifest(assignment.generation)
    if manifest is None:
        outcomes = run.load_waves(wave.index for wave in assignment.waves)
        users = _users_of(assignment, outcomes, store)
        writer = store.begin(assignment.generation, KIND)
        report = build_report(assignment, stats, outcomes, seconds)
        writer.write_side_object("report.json", json.dumps(report, indent=1).encode())
        spec = assignment.settings.adapter_spec(assignment.labels.outputs)
        manifest = writer.commit(
            expected_users=users,
            model=ModelRef(name=spec.model, weight_hash=weight_hash),
            adapter_config={
                "spec": spec.to_json(), "labels": assignment.labels.to_json(), "max_length": assignment.settings.model.max_length,
            },
            partition={"partitions": assignment.settings.training.partitions, "waves": len(assignment.waves)},
        )  # fmt: skip
    elif (current := store.manifest(store.current() or manifest.generation)) is None or current.created_at <= manifest.created_at:
        store.activate(assignment.generation)  # stopped between the two; but never take over from a newer generation
    run.delete()
    return Published(
        generation=manifest.generation,
        users=manifest.users,
        examples=manifest.examples,
        store=store.uri,
        report=store.objects.uri_of(f"generations/{manifest.generation}/report.json"),
        seconds=seconds,
    )


def _users_of(assignment: Assignment, outcomes: dict[int, WaveOutcome], store: AdapterStore) -> int:
    """Users that the waves hold. Every wave must have run; only users erased since the plan may be missing from one."""
    erased = len(store.tombstones())
    missing = [wave.index for wave in assignment.waves if wave.index not in outcomes]
    if missing:
        raise StoreError(f"{len(missing)} of {len(assignment.waves)} waves are not trained (the first is {missing[0]}): run the job again")
    planned = sum(wave.stop - wave.start for wave in assignment.waves)
    users = sum(len(outcome.examples) for outcome in outcomes.values())
    if not planned - erased <= users <= planned:
        raise StoreError(f"the waves hold {users} users, but {planned} were planned and {erased} erased: run the job again")
    return users


def build_report(assignment: Assignment, stats: PartitionStats, outcomes: dict[int, WaveOutcome], seconds: float) -> dict[str, Any]:
    """What was trained and, if there are test rows, how well it predicts them with and without the user. No user ids, no texts."""
    report: dict[str, Any] = {
        "generation": assignment.generation,
        "seconds": round(seconds, 1),
        "users": sum(len(outcome.examples) for outcome in outcomes.values()),
        "rows": {split: stats.rows(split) for split in ("train", "validation", "test")},
        "bad_rows_skipped": stats.skipped,
        "labels": assignment.labels.to_json(),
        "settings": assignment.settings.model_dump(mode="json", exclude={"serving": True, "data": {"storage_options"}}),
    }
    merged = _merge(outcomes)
    if merged is not None and len(merged.labels):
        report["test"] = _test_scores(merged, assignment.labels)
    if assignment.settings.data.source.startswith("synthetic:"):
        report["ceilings"] = asdict(ceilings(SyntheticParams.from_url(assignment.settings.data.source)))
    return report


def _merge(outcomes: dict[int, WaveOutcome]) -> WaveOutcome | None:
    """All waves as one, users numbered through."""
    if not outcomes:
        return None
    parts = [outcomes[wave] for wave in sorted(outcomes)]
    starts = np.cumsum([0, *(len(part.examples) for part in parts)])
    merged: dict[str, np.ndarray] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])}
    merged["row_users"] = np.concatenate([part.row_users + start for part, start in zip(parts, starts[:-1], strict=True)])
    return WaveOutcome(**merged)


def _test_scores(merged: WaveOutcome, labels: LabelSpace) -> dict[str, Any]:
    if labels.task == "regression":
        true = merged.labels * labels.std + labels.mean
        predicted, without = (logits[:, 0] * labels.std + labels.mean for logits in (merged.personal, merged.population))
        return {
            "with_user": as_json(regression_scores(predicted, true)),
            "without_user": as_json(regression_scores(without, true)),
            "squared_error_gain": paired((predicted - true) ** 2, (without - true) ** 2, merged.row_users),
        }
    personal, population = log_softmax(merged.personal), log_softmax(merged.population)
    frequencies = merged.label_counts.sum(axis=0) / merged.label_counts.sum()
    prior = label_prior_log_probabilities(merged.label_counts, merged.row_users, frequencies)
    correct = [(scores.argmax(axis=1) == merged.labels).astype(float) for scores in (personal, population)]
    return {
        "with_user": as_json(classification_scores(personal, merged.labels)),
        "without_user": as_json(classification_scores(population, merged.labels)),
        "user_label_prior": as_json(classification_scores(prior, merged.labels)),
        "accuracy_gain": paired(-correct[0], -correct[1], merged.row_users),
        "nll_gain": paired(row_nll(personal, merged.labels), row_nll(population, merged.labels), merged.row_users),
    }
