"""Waves: the user stage's units of work and of resume, the same for every number of workers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Wave:
    """Users `start` to `stop` (in key order) of those of `partition` that have training rows. index: names its segment."""

    index: int
    partition: int
    start: int
    stop: int


def plan_waves(trainable_users: Mapping[int, int], users_per_wave: int) -> list[Wave]:
    """Cut every partition into waves of nearly equal size. trainable_users: partition -> users with training rows."""
    waves: list[Wave] = []
    for partition in sorted(trainable_users):
        users = trainable_users[partition]
        count = -(-users // users_per_wave)
        bounds = [users * part // count for part in range(count + 1)] if count else []
        waves += [Wave(len(waves) + offset, partition, *span) for offset, span in enumerate(zip(bounds, bounds[1:], strict=False))]
    return waves


def owned_partitions(partitions: int, rank: int, ranks: int) -> list[int]:
    """The partitions a rank owns: every ranks-th one."""
    return list(range(rank, partitions, ranks))
