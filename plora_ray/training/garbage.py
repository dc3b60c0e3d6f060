"""Garbage collection of a whole store: given-up runs, what erased users left in generations, and generations beyond the newest few.

A generation that is kept, to serve or to roll back to, and holds bytes of erased users is written anew without them; the old one goes
when readers have had the grace time to leave it. Knows when each may go; the store knows how.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from plora_ray.errors import StoreError
from plora_ray.store import AdapterStore
from plora_ray.store.collection import Collected, check_keep, collect
from plora_ray.store.erased_bytes import COMPACTED, ErasedBytes, erased_bytes
from plora_ray.store.manifest import Manifest
from plora_ray.training.compaction import compact, compaction_run
from plora_ray.training.runs import RunsLeft, delete_abandoned_runs


@dataclass(frozen=True)
class Rewritten:
    """A generation that was written anew, as the generation `by`; None: it would be, in a dry run."""

    generation: str
    erased: ErasedBytes
    by: str | None

    @property
    def held(self) -> str:
        """What is no longer in it, for people."""
        return f"{self.erased.records:,} records and {self.erased.row_digests:,} row digests of erased users"


@dataclass
class Garbage:
    """runs: names of given-up ones, deleted. left: generations that still hold erased users' bytes, and why. failed: any by an error."""

    runs: list[str] = field(default_factory=list)
    rewritten: list[Rewritten] = field(default_factory=list)
    deleted: list[Collected] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    failed: bool = False


def collect_garbage(
    store: AdapterStore, *, keep: int, grace_s: float, on_users: Callable[[int, int], None], dry_run: bool = False
) -> Garbage:
    """Collect what may go. Stopped and called again it goes on; whoever is served something is served the same at every moment.

    keep, grace_s: see `plora_ray.store.collection.collect`. on_users: hears how many users of how many are written, a generation at a time.
    Raises StoreError if nothing can be collected; what keeps one generation from being written anew is told in the result.
    """
    check_keep(keep)
    runs = delete_abandoned_runs(store.objects, grace_s=grace_s, dry_run=dry_run)
    rewriting = _Rewriting(store, runs, on_users, dry_run)
    rewriting.run(keep)
    garbage = rewriting.garbage
    needed = delete_abandoned_runs(store.objects, grace_s=grace_s, dry_run=True).needed
    garbage.deleted = collect(store, keep=keep, grace_s=grace_s, needed=needed, replaced=rewriting.replaced(), dry_run=dry_run)
    gone = {item.generation for item in garbage.deleted}
    for generation in rewriting.held.keys() - gone - garbage.left.keys():
        garbage.left[generation] = "holds bytes of erased users until its readers have had the grace time; run gc again then"
    return garbage


class _Rewriting:
    """The part of a collection that writes generations anew. held: published generations with bytes of erased users, oldest first."""

    def __init__(self, store: AdapterStore, runs: RunsLeft, on_users: Callable[[int, int], None], dry_run: bool) -> None:
        self._store, self._runs, self._on_users, self._dry_run = store, runs, on_users, dry_run
        self.garbage = Garbage(runs.deleted)
        self._published = self._manifests()
        self.held = {manifest.generation: held for manifest in self._published if (held := self._held(manifest)).any}

    def run(self, keep: int) -> None:
        """Write anew what stays and holds bytes of erased users: what serves first, then what is kept to roll back to, newest first."""
        replaced = self.replaced()
        current = self._serving(replaced)
        kept = [manifest.generation for manifest in self._published if manifest.generation not in replaced][-keep:]
        unfinished = [generation for generation in replaced if compaction_run(generation) in self._runs.alive]
        for generation in dict.fromkeys([current, *reversed(kept), *unfinished]):
            if generation is None or generation not in self.held:
                continue
            if self._needed_by_others(generation):
                self.garbage.left[generation] = "holds bytes of erased users, and a job makes it or starts from it; run gc again after that"
            else:
                self._write_anew(generation)

    def replaced(self) -> dict[str, str | None]:
        """Which generations that hold bytes of erased users stand anew in the store, and as what; None: they would, in a dry run."""
        by = {manifest.partition.get(COMPACTED): manifest.generation for manifest in self._manifests()}
        would = {again.generation: again.by for again in self.garbage.rewritten if again.by is None}
        return {generation: by[generation] for generation in self.held if generation in by} | would

    def _write_anew(self, generation: str) -> None:
        by = None
        if not self._dry_run:
            try:
                by = compact(self._store, self._on_users, generation).generation
            except StoreError as error:
                self.garbage.left[generation] = f"holds bytes of erased users and can't be written anew: {error}"
                self.garbage.failed = True
                return
        self.garbage.rewritten.append(Rewritten(generation, self.held[generation], by))

    def _serving(self, replaced: dict[str, str | None]) -> str | None:
        """The current generation. One that was replaced before a rollback made it serve again yields to what stands in for it."""
        current = self._store.current()
        while current is not None and (stand_in := replaced.get(current)) is not None:
            if not self._dry_run:
                self._store.succeed(current, stand_in)
            current = stand_in
        return current

    def _needed_by_others(self, generation: str) -> bool:
        mine = compaction_run(generation)
        return any(generation in needed for name, needed in self._runs.alive.items() if name != mine)

    def _manifests(self) -> list[Manifest]:
        """Of all published generations, oldest first."""
        found = [self._store.manifest(info.generation) for info in self._store.generations()]
        return [manifest for manifest in found if manifest is not None]

    def _held(self, manifest: Manifest) -> ErasedBytes:
        try:
            return erased_bytes(self._store, manifest)
        except StoreError as error:
            self.garbage.left[manifest.generation] = f"may hold bytes of erased users and can't be read: {error}"
            self.garbage.failed = True
            return ErasedBytes(0, 0)
