"""A generation without training: an older one with its fresh adapters taken in and its erased users' records gone.

The same plan, waves and end as a retraining in which nobody has new rows; needs no rows, no model and no cluster.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Set
from dataclasses import dataclass

import numpy as np

from plora_ray.adapters.labels import LabelSpace
from plora_ray.data.trained_users import TrainedUsers
from plora_ray.identity import KEY_BYTES
from plora_ray.store import AdapterStore, GenerationWriter
from plora_ray.store.collection import abandon
from plora_ray.store.erased_bytes import erased_bytes
from plora_ray.store.folding import raise_late_versions
from plora_ray.store.lineage import COMPACTED, UNUSED
from plora_ray.store.manifest import Manifest, SegmentRef
from plora_ray.training.carry_over import Base, plan_new_data
from plora_ray.training.memory import MAX_USERS_PER_WAVE, copied_bytes
from plora_ray.training.plan import Plan
from plora_ray.training.run_state import RunState
from plora_ray.training.runs import Heartbeat, end_runs_of
from plora_ray.training.wave_users import SegmentUsers, WaveUsers
from plora_ray.training.waves import Wave, WaveLimits

USERS_PER_PARTITION = 100_000  # planned at once
WAVE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Compacted:
    """generation: that was made, or the base if nothing was to do. active: False if another than the base served in the end.

    folded: fresh adapters taken in. dropped: erased users of the base whose records are gone.
    """

    generation: str
    users: int
    folded: int
    dropped: int
    changed: bool
    active: bool


def compact(
    store: AdapterStore, on_users: Callable[[int, int], None], generation: str | None = None, unused: Set[bytes] = frozenset()
) -> Compacted:
    """Make the next generation out of the current one. Stopped and called again it goes on; nothing is lost at any moment.

    generation: the one to do it to, if not just the current; what comes out has its age, gives every user what it would give, and
    serves if it did. unused: users to leave out, whose fresh adapters aren't taken in either.
    on_users: hears how many users of how many are written. Raises StoreError.
    """
    reader = store.open_generation(generation)
    end_runs_of(store.objects, reader.manifest)
    base = Base(reader, LabelSpace.from_json(reader.manifest.adapter_config["labels"]))
    run = RunState(store.objects, compaction_run(reader.generation))
    created_at = None if generation is None else reader.manifest.created_at
    generation = run.begin(reader.generation)[0].generation
    manifest = store.manifest(generation)
    plan = None
    if manifest is None:
        writer = store.begin(generation, reader.manifest.kind)  # before the plan: fresh adapters that it can't know are newer
        plan = run.plan.load() or _plan(store, base, run, unused)
        if not plan.folded and plan.users == reader.users and not erased_bytes(store, reader.manifest).any:
            abandon(store, generation)
            run.delete()
            return Compacted(reader.generation, reader.users, 0, 0, changed=False, active=True)
        with Heartbeat(run):
            left = {UNUSED: sum(reader.lookup(key) is not None for key in unused)} if unused else {}
            manifest = _write(store, base, run, plan, writer, on_users, created_at, left)
    plan = plan or run.plan.load()
    if plan is not None:  # else an earlier start has come so far that it was deleting the run
        raise_late_versions(store.objects, run.plan.fresh_seen(), manifest.shared.sha256, manifest.version)
        store.succeed(reader.generation, generation)
    run.delete()
    store.tombstones()
    dropped, folded = reader.users - len(list(reader.keys())), 0 if plan is None else plan.folded
    return Compacted(generation, manifest.users, folded, dropped, changed=True, active=store.current() == generation)


def compaction_run(generation: str) -> str:
    """The name of the run that compacts `generation`."""
    return hashlib.blake2b(f"compact {generation}".encode(), digest_size=16).hexdigest()


def _plan(store: AdapterStore, base: Base, run: RunState, unused: Set[bytes]) -> Plan:
    nobody = TrainedUsers(np.empty((0, KEY_BYTES), np.uint8), np.empty((0, KEY_BYTES), np.uint8), np.empty(0, np.int32))
    width = base.reader.manifest.width
    limits = WaveLimits(MAX_USERS_PER_WAVE, WAVE_BYTES, lambda fitted, rows, copied: copied_bytes(width, copied))
    partitions = max(1, -(-base.reader.users // USERS_PER_PARTITION))
    plan, snapshot = plan_new_data(store, base, lambda partition: nobody, partitions, limits, run.plan.save_partition, unused)
    return run.plan.save(plan, snapshot.seen)


def _write(
    store: AdapterStore, base: Base, run: RunState, plan: Plan, writer: GenerationWriter, on_users: Callable[[int, int], None],
    created_at: str | None, left: dict[str, int],
) -> Manifest:  # fmt: skip
    """Every wave that isn't finished yet, then the manifest."""
    before = base.reader.manifest
    writer.copy_shared(store.objects.read(before.shared.path))
    finished = writer.finished_waves()
    on_users(_users(finished), plan.users)
    for wave in plan.waves:
        if wave.index not in finished:
            segment = _write_wave(store, base, run, wave, writer)
            if segment is not None:
                finished[wave.index] = segment
                on_users(_users(finished), plan.users)
        users = finished[wave.index].users if wave.index in finished else 0
        run.plan.check_users(wave, users, store.tombstones().keys())
    return writer.commit(
        expected_users=_users(finished), model=before.model, adapter_config=before.adapter_config,
        partition={"waves": len(plan.waves), COMPACTED: before.generation, **left}, segments=finished, activate=False,
        created_at=created_at,
    )  # fmt: skip


def _users(segments: dict[int, SegmentRef]) -> int:
    return sum(segment.users for segment in segments.values())


def _write_wave(store: AdapterStore, base: Base, run: RunState, wave: Wave, writer: GenerationWriter) -> SegmentRef | None:
    users = WaveUsers({wave.partition: run.plan.load_partition(wave.partition)}, base.reader, writer)
    nobody = SegmentUsers(np.empty((0, KEY_BYTES), np.uint8), np.empty((0, 0), np.float32), np.empty(0, np.int32))
    return users.write(wave, nobody, users.unchanged(wave, store.tombstones().keys()), lambda segment: None)
