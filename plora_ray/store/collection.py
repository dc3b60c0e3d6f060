"""Removing what nobody needs any more: old generations, and what crashed jobs left behind.

Deletes whole generations only, manifest first, so that a reader sees a generation whole or not at all. The current
generation, a canary, the newest `keep` and everything younger than the grace time stay.
"""

from __future__ import annotations

import time
from collections.abc import Set
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


def collect(store: AdapterStore, *, keep: int, grace_s: float, needed: Set[str] = frozenset(), dry_run: bool = False) -> list[Collected]:
    """Delete published generations beyond the newest `keep` and unfinished ones, begun longer than `grace_s` ago.

    needed: generations that jobs at work make or start from; they stay.
    Raises StoreError if `keep` would leave nothing to roll back to (below one).
    """
    if keep < 1:
        raise StoreError(f"keep is {keep}: at least one published generation must stay")
    for item in store.objects.list(PROBE):  # left by a process that was killed while it probed
        if time.time() - item.modified_s >= grace_s and not dry_run:
            store.objects.delete(item.path)
    published = [info.generation for info in store.generations()]
    canary = store.canary()
    staying = {*published[-keep:], store.current(), canary.generation if canary else None, *needed}
    collected = []
    for generation in store.objects.folders(names.GENERATIONS):
        if generation in staying or time.time() - _begun_s(store, generation) < grace_s:
            continue
        objects = store.objects.list(f"{names.GENERATIONS}/{generation}")
        collected.append(Collected(generation, generation in published, len(objects), sum(item.size for item in objects)))
        if not dry_run:
            _delete(store, generation)
    return collected


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
    """Unix time at which the generation was begun; now (so it stays) if that can't be told."""
    path = names.beginning(generation)
    data = store.objects.read_many([path]).get(path)
    if data is None:
        return time.time()
    return int(load_json(Beginning, data, store.objects.uri_of(path)).version.partition("-")[0]) / 1e9
