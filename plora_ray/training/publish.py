"""The end of a run: the committed generation with its report, and no trace of users' texts left behind."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from plora_ray.errors import StoreError
from plora_ray.store import AdapterStore
from plora_ray.store.collection import abandon
from plora_ray.store.folding import raise_late_versions
from plora_ray.store.lineage import CARRIED
from plora_ray.store.manifest import Manifest, ModelRef, SegmentRef
from plora_ray.store.uses import begin_uses, today, write_uses
from plora_ray.training.plan import Action
from plora_ray.training.prepare import Prepared
from plora_ray.training.progress import ProgressLine
from plora_ray.training.report import REPORT_HTML, REPORT_JSON, TrainingReport


@dataclass(frozen=True)
class Published:
    """The job's last line on standard output. active: whether the generation serves now."""

    generation: str
    users: int
    examples: int
    store: str
    report: str
    report_html: str
    seconds: float
    active: bool

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "seconds": round(self.seconds, 1)})


def publish(
    prepared: Prepared, report: TrainingReport, segments: Mapping[int, SegmentRef], line: ProgressLine, *, seconds: float
) -> Published:
    """Write the report, commit the generation with these segments, make it current, delete the run's folder.

    Raises StoreError, with nothing published.
    """
    assignment, settings = prepared.assignment, prepared.assignment.settings
    writer = prepared.store.resume(assignment.generation)
    for name, data in report.files.items():
        writer.write_side_object(name, data)
    spec = settings.adapter_spec(assignment.labels.outputs)
    writer.commit(
        expected_users=report.totals.users + report.totals.copied,
        model=ModelRef(name=spec.model, weight_hash=prepared.weight_hash),
        adapter_config={
            "spec": spec.to_json(), "labels": assignment.labels.to_json(), "max_length": settings.model.max_length,
            "fit": settings.user_fit().to_json(),
        },
        partition={
            "partitions": settings.training.partitions, "waves": len(assignment.waves),
            **({CARRIED: assignment.base} if settings.training.only_users_with_new_data else {}),
        },
        segments=segments,
        activate=settings.training.activate and not settings.training.only_users_with_new_data,  # `finish` decides about these
    )  # fmt: skip
    return finish(prepared, line, seconds=seconds)


def finish(prepared: Prepared, line: ProgressLine, *, seconds: float) -> Published:
    """What is left to do once the manifest stands; done again, harmlessly, by a job that was stopped in between.

    A generation of carried-over users doesn't take over if another than its base serves by now; none does with training.activate false.
    """
    store, generation = prepared.store, prepared.assignment.generation
    manifest = store.manifest(generation)
    if manifest is None:
        raise StoreError(f"generation {generation} isn't published: run the job again")
    current = store.manifest(store.current() or generation)
    activate = prepared.assignment.settings.training.activate
    if prepared.assignment.settings.training.only_users_with_new_data:
        _succeed_base(prepared, manifest, line, activate)
    elif activate and store.current() != generation and (current is None or current.created_at <= manifest.created_at):
        store.activate(generation)  # never take over from a newer generation
    if not activate:
        line.say(f"generation {generation} is published and doesn't serve: `plora generations canary` tries it, `activate` makes it serve")
    if prepared.assignment.settings.store.retention.unused_adapters_days is not None:
        _note_fitted(prepared)
    prepared.run.delete()
    return _published(store, manifest, seconds)


def stored_report(store: AdapterStore, generation: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The report of a published generation: report.json's values, and both files by name. Raises StoreError."""
    files = {name: store.objects.read(f"generations/{generation}/{name}") for name in (REPORT_JSON, REPORT_HTML)}
    return json.loads(files[REPORT_JSON]), files


def unchanged(prepared: Prepared, line: ProgressLine, *, seconds: float) -> Published:
    """No user has new data: the base stays, and the run's folder is deleted."""
    assert prepared.base is not None
    manifest = prepared.base.reader.manifest
    line.say(f"no user has new data since generation {manifest.generation}: nothing is trained and nothing new is published")
    abandon(prepared.store, prepared.assignment.generation)
    prepared.run.delete()
    return _published(prepared.store, manifest, seconds)


def _succeed_base(prepared: Prepared, manifest: Manifest, line: ProgressLine, activate: bool) -> None:
    """Take over from the base if `activate`, unless another generation did meanwhile."""
    store, base, generation = prepared.store, prepared.assignment.base, manifest.generation
    assert base is not None
    raise_late_versions(store.objects, prepared.run.plan.fresh_seen(), manifest.shared.sha256, manifest.version)
    if activate and not store.succeed(base, generation):
        line.say(
            f"generation {generation} is published but doesn't serve, because {store.current()} took over from its base {base} "
            f"meanwhile: `plora generations activate {generation}` makes it serve"
        )


def _note_fitted(prepared: Prepared) -> None:
    """Write down that the adapters of the users who were fitted are in use."""
    run, objects = prepared.run, prepared.store.objects
    plan = run.plan.load()
    begin_uses(objects)
    for partition in sorted({wave.partition for wave in plan.waves}) if plan is not None else []:
        planned = run.plan.load_partition(partition)
        write_uses(objects, (key.tobytes() for key in planned.keys[planned.actions == Action.FIT]), today())


def _published(store: AdapterStore, manifest: Manifest, seconds: float) -> Published:
    reports = {name: store.objects.uri_of(f"generations/{manifest.generation}/{name}") for name in (REPORT_JSON, REPORT_HTML)}
    return Published(
        generation=manifest.generation,
        users=manifest.users,
        examples=manifest.examples,
        store=store.uri,
        report=reports[REPORT_JSON],
        report_html=reports[REPORT_HTML],
        seconds=seconds,
        active=store.current() == manifest.generation,
    )
