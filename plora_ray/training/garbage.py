"""Garbage collection of a whole store: given-up runs, what erased users left in generations, and generations beyond the newest few.

A generation that is kept, to serve or to roll back to, and holds bytes of erased users is written anew without them; the old one goes
when readers have had the grace time to leave it. Knows when each may go; the store knows how.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Set
from dataclasses import dataclass, field

from plora_ray.config import RetentionSettings
from plora_ray.errors import StoreError
from plora_ray.store import AdapterStore
from plora_ray.store.collection import Collected, check_keep, collect
from plora_ray.store.erased_bytes import ErasedBytes, erased_bytes
from plora_ray.store.lineage import COMPACTED, UNUSED
from plora_ray.store.manifest import Manifest
from plora_ray.store.unused import Unused, forget_unused, unused_users
from plora_ray.store.uses import fold_uses, today
from plora_ray.training.compaction import compact, compaction_run
from plora_ray.training.runs import RunsLeft, delete_abandoned_runs

FOR_GOOD_DAYS = 36_500


@dataclass(frozen=True)
class Rewritten:
    """A generation that was written anew, as the generation `by`; None: it would be, in a dry run.

    erased, unused: what it no longer has, of erased users and of users who didn't use theirs.
    """

    generation: str
    erased: ErasedBytes
    unused: int
    by: str | None

    @property
    def held(self) -> str:
        """What is no longer in it, for people."""
        erased = f"{self.erased.records:,} records and {self.erased.row_digests:,} row digests of erased users"
        return f"{erased} and the adapters of {self.unused:,} users who didn't use them" if self.unused else erased


@dataclass
class Garbage:
    """runs: names of given-up ones, deleted. left: what stays although it should go, and why. failed: any of it by an error.

    forgotten: unused fresh adapters that were taken away. expired: users of whom retained examples were.
    """

    runs: list[str] = field(default_factory=list)
    rewritten: list[Rewritten] = field(default_factory=list)
    deleted: list[Collected] = field(default_factory=list)
    forgotten: int = 0
    expired: int = 0
    left: dict[str, str] = field(default_factory=dict)
    failed: bool = False


def collect_garbage(
    store: AdapterStore, *, keep: int, grace_s: float, on_users: Callable[[int, int], None],
    retention: RetentionSettings = RetentionSettings(), dry_run: bool = False,
) -> Garbage:  # fmt: skip
    """Collect what may go. Stopped and called again it goes on; whoever is served something is served the same at every moment.

    keep, grace_s: see `plora_ray.store.collection.collect`. on_users: hears how many users of how many are written, a generation at a time.
    retention: says which adapters that nobody uses go from what serves, and which retained examples.
    Raises StoreError if nothing can be collected; what keeps one generation from being written anew is told in the result.
    """
    check_keep(keep)
    runs = delete_abandoned_runs(store.objects, grace_s=grace_s, dry_run=dry_run)
    rewriting = _Rewriting(store, runs, on_users, dry_run)
    unused_days = retention.unused_adapters_days
    unused = Unused() if unused_days is None or store.current() is None else unused_users(store, unused_days, dry_run=dry_run)
    rewriting.run(keep, unused.keys)
    garbage = rewriting.garbage
    if unused.not_yet is not None:
        garbage.left["unused adapters"] = unused.not_yet
    if unused_days is not None and not dry_run:
        garbage.forgotten = forget_unused(store, unused) if unused.keys else 0
        fold_uses(store.objects, today() - datetime.timedelta(days=unused_days))
    if not dry_run:
        garbage.expired = store.retained_examples(retention.examples_days or FOR_GOOD_DAYS).expire()
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

    def run(self, keep: int, unused: Set[bytes]) -> None:
        """Write anew what stays and holds bytes of erased users: what serves first, then what is kept to roll back to, newest first.

        unused: users whose adapters leave what serves.
        """
        replaced = self.replaced()
        canary = self._store.canary()
        current = self._serving(replaced) if canary is None else self._store.current()
        tried = {canary.generation, current} if canary is not None else set()  # whatever took their place would end the canary
        kept = [manifest.generation for manifest in self._published if manifest.generation not in replaced][-keep:]
        unfinished = [generation for generation in replaced if compaction_run(generation) in self._runs.alive]
        for generation in dict.fromkeys([current, *reversed(kept), *unfinished]):
            leaving = self._having(generation, unused) if generation == current else frozenset()
            if generation is None or (generation not in self.held and not leaving):
                continue
            if self._needed_by_others(generation):
                self.garbage.left[generation] = "stays as it is because a job makes it or starts from it; run gc again after that"
            elif generation in tried:
                self.garbage.left[generation] = "stays as it is while a canary runs; run gc again when it has ended"
            else:
                self._write_anew(generation, leaving)

    def replaced(self) -> dict[str, str | None]:
        """Which generations that hold what has to go stand anew in the store, and as what; None: they would, in a dry run."""
        made = [manifest for manifest in self._manifests() if COMPACTED in manifest.partition]
        of = {manifest.generation: str(manifest.partition[COMPACTED]) for manifest in made}
        by = {of[m.generation]: m.generation for m in made if of[m.generation] in self.held or m.partition.get(UNUSED)}
        return by | {again.generation: again.by for again in self.garbage.rewritten if again.by is None}

    def _having(self, generation: str | None, unused: Set[bytes]) -> frozenset[bytes]:
        """Those of `unused` whom the generation holds."""
        if generation is None or not unused:
            return frozenset()
        reader = self._store.open_generation(generation)
        return frozenset(key for key in unused if reader.lookup(key) is not None)

    def _write_anew(self, generation: str, unused: frozenset[bytes]) -> None:
        by = None
        if not self._dry_run:
            try:
                by = compact(self._store, self._on_users, generation, unused).generation
            except StoreError as error:
                self.garbage.left[generation] = f"holds what has to go and can't be written anew: {error}"
                self.garbage.failed = True
                return
        held = self.held.get(generation, ErasedBytes(0, 0))
        self.garbage.rewritten.append(Rewritten(generation, held, len(unused), by))

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
