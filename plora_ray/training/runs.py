"""All runs of a store: which are alive, which were given up, and the sign of life that tells them apart."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass, field

from plora_ray.errors import StoreError
from plora_ray.store.folding import raise_late_versions
from plora_ray.store.manifest import Manifest
from plora_ray.store.objects import ObjectStore
from plora_ray.training.run_state import RUNS, RunState

BEAT_S = 300.0
ALIVE_S = 3600.0  # a run with a younger sign of life is at work, whatever grace the operator gives


class Heartbeat:
    """A context manager around a run's work: a sign of life every BEAT_S seconds. One that fails is made up for by the next."""

    def __init__(self, run: RunState, every_s: float = BEAT_S) -> None:
        self._run, self._every_s = run, every_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._over.wait(self._every_s):
            with contextlib.suppress(StoreError):
                self._run.beat()


@dataclass
class RunsLeft:
    """deleted: names of abandoned runs. alive: the other runs, and which generations each makes or starts from."""

    deleted: list[str] = field(default_factory=list)
    alive: dict[str, set[str]] = field(default_factory=dict)

    @property
    def needed(self) -> set[str]:
        """The generations that runs at work make or start from."""
        return set().union(*self.alive.values())


def delete_abandoned_runs(objects: ObjectStore, *, grace_s: float, dry_run: bool = False) -> RunsLeft:
    """Delete the folders of runs in which nothing was written for `grace_s`; a run at work writes at least every BEAT_S."""
    left = RunsLeft()
    for name in objects.folders(RUNS):
        run = RunState(objects, name)
        head = run.head()
        written = [item.modified_s for item in objects.list(run.folder)]
        if written and time.time() - max(written) < max(grace_s, ALIVE_S):
            left.alive[name] = {generation for generation in (head.generation, head.base) if generation} if head else set()
            continue
        left.deleted.append(name)
        if not dry_run:
            run.delete()
    return left


def end_runs_of(objects: ObjectStore, manifest: Manifest) -> None:
    """What a run that was stopped after it had published this generation left undone: late adapters raised, its folder deleted."""
    for name in objects.folders(RUNS):
        run = RunState(objects, name)
        head = run.head()
        if head is None or head.generation != manifest.generation:
            continue
        if run.plan.load() is not None:
            raise_late_versions(objects, run.plan.fresh_seen(), manifest.shared.sha256, manifest.version)
        run.delete()
