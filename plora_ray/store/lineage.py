"""How a generation came about, as entries of its manifest's `partition`: what others must know of it beyond what it holds."""

from __future__ import annotations

from plora_ray.store.manifest import Manifest

COMPACTED = "compacted"  # the generation that this one was made of without training
CARRIED = "carried"  # the generation whose users were carried over while some were trained
UNUSED = "unused"  # how many users it was made without because nobody used their adapters


def may_hold_fresh(manifest: Manifest) -> bool:
    """Whether records of this generation may be fresh adapters that it took in: it has the shared parameters of an older one."""
    return not manifest.partition.keys().isdisjoint((COMPACTED, CARRIED))


def begun_s(manifest: Manifest) -> float:
    """Unix time at which the generation was begun."""
    return int(manifest.version.partition("-")[0]) / 1e9
