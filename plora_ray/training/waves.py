"""Waves: the user stage's units of work and of resume, the same for every number of workers and every machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

MiB = 2**20

WaveBytes = Callable[[int, int, int], int]  # bytes of a wave of so many users to fit, their training rows, and users to copy


@dataclass(frozen=True)
class Wave:
    """Users `start` to `stop` (in key order) of those that the run plans in `partition`. index: names its segment."""

    index: int
    partition: int
    start: int
    stop: int


@dataclass(frozen=True)
class WaveLimits:
    """users: most users of a wave. memory_bytes: what `bytes_of` may reach, except for a single user that needs more."""

    users: int
    memory_bytes: int
    bytes_of: WaveBytes


def cut_waves(rows: np.ndarray, limits: WaveLimits) -> list[tuple[int, int]]:
    """Cut users into consecutive (start, stop) within the limits, each as long as it can be.

    rows: int [users] training rows of each user, 0 for one that is only copied. `bytes_of` must not fall as a wave grows.
    """
    fitted, total = np.cumsum([0, *(rows > 0)]), np.cumsum([0, *rows])
    spans: list[tuple[int, int]] = []
    start = 0
    while start < len(rows):
        low, high = start + 1, min(start + limits.users, len(rows))  # low always fits or is a user alone
        while low < high:
            stop = (low + high + 1) // 2
            if span_bytes(fitted, total, start, stop, limits) <= limits.memory_bytes:
                low = stop
            else:
                high = stop - 1
        spans.append((start, low))
        start = low
    return spans


def span_bytes(fitted: np.ndarray, total: np.ndarray, start: int, stop: int, limits: WaveLimits) -> int:
    """Bytes of the wave from user `start` to `stop`, given cumulative numbers of users to fit and of their rows."""
    users = int(fitted[stop] - fitted[start])
    return limits.bytes_of(users, int(total[stop] - total[start]), stop - start - users)


def owned_partitions(partitions: int, rank: int, ranks: int) -> list[int]:
    """The partitions a rank owns: every ranks-th one."""
    return list(range(rank, partitions, ranks))
