"""Removing what nobody needs any more: old generations, and what crashed jobs left behind.

Deletes whole generations only, manifest first, so that a reader sees a generation whole or not at all. The current
generation, a canary, the newest `keep` and everything younger than the grace time stay; one that was written anew without its erased
users goes once what replaced it is older than the grace time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Set
from dataclasses import dataclass

from plora_ray.errors import StoreError
from plora_ray.store import names
from plora_ray.store.adapter_store import AdapterStore
from plora_ray.store.manifest import Beginning, load_json
from plora_ray.store.objects import PROBE


@dataclass(frozen=True)
class Collected:
    """One generation that goes (or, in a dry run, would go). objects, size: how many and how many bytes."""

    generation: str
    published: bool
    objects: int
    size: int


def collect(
    store: AdapterStore, *, keep: int, grace_s: float, needed: Set[str] = frozenset(), replaced: Mapping[str, str | None] | None = None,
    dry_run: bool = False,
) -> list[Collected]:  # fmt: skip
    """Delete published generations beyond the newest `keep` and unfinished ones, begun longer than `grace_s` ago.

    needed: generations that jobs at work make or start from; they stay. replaced: generations that another one, whose name it maps to,
    stands in for (None: one that isn't written, in a dry run); they don't count as kept and go when that one was begun longer than
    `grace_s` ago.
    Raises StoreError if `keep` would leave nothing to roll back to (below one).
    """
    check_keep(keep)
    replaced = replaced or {}
    for item in store.objects.list(PROBE):  # left by a process that was killed while it probed
        if time.time() - item.modified_s >= grace_s and not dry_run:
            store.objects.delete(item.path)
    if not dry_run:
        store.objects.abort_uploads(grace_s)
    published = [info.generation for info in store.generations()]
    current, canary = store.current(), store.canary()
    kept = set([generation for generation in published if replaced.get(generation) is None][-keep:])
    staying = {*(kept - replaced.keys()), *needed, *([canary.generation] if canary else [])}
    if current is not None and replaced.get(current, current) is not None:  # else what is to replace it will serve by then
        staying.add(current)
    found = store.objects.folders(names.GENERATIONS)
    begun_s, now_s = {generation: _begun_s(store, generation) for generation in found}, time.time()
    collected = []
    for generation in sorted(found, key=begun_s.__getitem__):  # what stands in for another one goes after it
        stand_in = replaced.get(generation, generation)
        if generation in staying or now_s - (now_s if stand_in is None else begun_s.get(stand_in, math.inf)) < grace_s:
            continue
        objects = store.objects.list(f"{names.GENERATIONS}/{generation}")
        collected.append(Collected(generation, generation in published, len(objects), sum(item.size for item in objects)))
        if not dry_run:
            _delete(store, generation)
    return collected


def check_keep(keep: int) -> None:
    """Raises StoreError if `keep` generations are too few to stay."""
    if keep < 1:
        raise StoreError(f"keep is {keep}: at least one published generation must stay")


def abandon(store: AdapterStore, generation: str) -> None:
    """Delete what was written of a generation that nobody will publish. Raises StoreError if it is published."""
    if store.manifest(generation) is not None:
        raise StoreError(f"generation {generation} is published: `plora generations gc` deletes it when it is old")
    _delete(store, generation)


def _delete(store: AdapterStore, generation: str) -> None:
    """The manifest first (then the generation doesn't exist), the beginning last (else its age is lost on a crash)."""
    store.objects.delete(names.manifest(generation))
    store.objects.delete_folder(f"{names.GENERATIONS}/{generation}", last=names.beginning(generation))


def _begun_s(store: AdapterStore, generation: str) -> float:
    """Unix time at which the generation was begun; infinite (so it stays) if that can't be told."""
    path = names.beginning(generation)
    data = store.objects.read_many([path]).get(path)
    if data is None:
        return math.inf
    return int(load_json(Beginning, data, store.objects.uri_of(path)).version.partition("-")[0]) / 1e9
