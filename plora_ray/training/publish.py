"""The end of a run: the committed generation with its report, and no trace of users' texts left behind."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from plora_ray.errors import StoreError
from plora_ray.store import AdapterStore
from plora_ray.store.manifest import ModelRef
from plora_ray.training.rank import Assignment
from plora_ray.training.report import REPORT_HTML, REPORT_JSON, TrainingReport
from plora_ray.training.run_state import RunState


@dataclass(frozen=True)
class Published:
    """The job's last line on standard output."""

    generation: str
    users: int
    examples: int
    store: str
    report: str
    report_html: str
    seconds: float

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "seconds": round(self.seconds, 1)})


def publish(
    store: AdapterStore, run: RunState, assignment: Assignment, report: TrainingReport, weight_hash: str, *, seconds: float
) -> Published:
    """Write the report, commit the generation, make it current, delete the run's folder. Raises StoreError, with nothing published."""
    writer = store.begin(assignment.generation, assignment.settings.adapter.kind)
    for name, data in report.files.items():
        writer.write_side_object(name, data)
    spec = assignment.settings.adapter_spec(assignment.labels.outputs)
    writer.commit(
        expected_users=report.totals.users,
        model=ModelRef(name=spec.model, weight_hash=weight_hash),
        adapter_config={
            "spec": spec.to_json(), "labels": assignment.labels.to_json(), "max_length": assignment.settings.model.max_length,
            "fit": assignment.settings.user_fit().to_json(),
        },
        partition={"partitions": assignment.settings.training.partitions, "waves": len(assignment.waves)},
    )  # fmt: skip
    return finish(store, run, assignment.generation, seconds=seconds)


def finish(store: AdapterStore, run: RunState, generation: str, *, seconds: float) -> Published:
    """What is left to do once the manifest stands; done again, harmlessly, by a job that was stopped in between."""
    manifest = store.manifest(generation)
    if manifest is None:
        raise StoreError(f"generation {generation} isn't published: run the job again")
    current = store.manifest(store.current() or generation)
    if store.current() != generation and (current is None or current.created_at <= manifest.created_at):
        store.activate(generation)  # never take over from a newer generation
    run.delete()
    reports = {name: store.objects.uri_of(f"generations/{generation}/{name}") for name in (REPORT_JSON, REPORT_HTML)}
    return Published(
        generation=generation,
        users=manifest.users,
        examples=manifest.examples,
        store=store.uri,
        report=reports[REPORT_JSON],
        report_html=reports[REPORT_HTML],
        seconds=seconds,
    )
