"""The end of a run: its report, the committed generation, and no trace of users' texts left behind."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from plora_ray.data.stats import PartitionStats
from plora_ray.data.synthetic import SyntheticParams, ceilings
from plora_ray.errors import StoreError
from plora_ray.store import AdapterStore
from plora_ray.store.manifest import ModelRef
from plora_ray.training.rank import KIND, Assignment
from plora_ray.training.run_state import RunState
from plora_ray.training.scores import WaveTotals


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
        totals = _add_up(assignment, run, stats, len(store.tombstones()))
        writer = store.begin(assignment.generation, KIND)
        report = build_report(assignment, stats, totals, seconds)
        writer.write_side_object("report.json", json.dumps(report, indent=1).encode())
        spec = assignment.settings.adapter_spec(assignment.labels.outputs)
        manifest = writer.commit(
            expected_users=totals.users,
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


def _add_up(assignment: Assignment, run: RunState, stats: PartitionStats, erased: int) -> WaveTotals:
    """All waves' outcomes. Every wave must have run; only users erased since the plan may be missing from one."""
    totals, missing = WaveTotals(assignment.labels, stats), {wave.index for wave in assignment.waves}
    for index, outcome in run.load_waves(sorted(missing)):
        totals.add(outcome)
        missing.discard(index)
    if missing:
        raise StoreError(
            f"{len(missing)} of {len(assignment.waves)} waves are not trained (the first is {min(missing)}): run the job again"
        )
    planned = sum(wave.stop - wave.start for wave in assignment.waves)
    if not planned - erased <= totals.users <= planned:
        raise StoreError(f"the waves hold {totals.users} users, but {planned} were planned and {erased} erased: run the job again")
    return totals


def build_report(assignment: Assignment, stats: PartitionStats, totals: WaveTotals, seconds: float) -> dict[str, Any]:
    """What was trained and, if there are test rows, how well it predicts them with and without the user. No user ids, no texts."""
    report: dict[str, Any] = {
        "generation": assignment.generation,
        "seconds": round(seconds, 1),
        "users": totals.users,
        "rows": {split: stats.rows(split) for split in ("train", "validation", "test")},
        "bad_rows_skipped": stats.skipped,
        "labels": assignment.labels.to_json(),
        "settings": assignment.settings.model_dump(mode="json", exclude={"serving": True, "data": {"storage_options"}}),
    }
    if totals.tested:
        report["test"] = totals.to_json()
    if assignment.settings.data.source.startswith("synthetic:"):
        report["ceilings"] = asdict(ceilings(SyntheticParams.from_url(assignment.settings.data.source)))
    return report
