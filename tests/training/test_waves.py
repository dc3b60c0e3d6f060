"""Waves and ownership: every user once, whatever the number of workers, and no wave larger than allowed."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from plora_ray.training.waves import WaveLimits, cut_waves, owned_partitions


def cost(users: int, rows: int, copied: int) -> int:
    return 100 + 10 * users + 3 * rows + copied


@given(rows=st.lists(st.integers(0, 500), max_size=60), users=st.integers(1, 20), memory=st.integers(1, 3000))
def test_every_user_lies_in_exactly_one_wave_within_its_bounds_unless_alone(rows: list[int], users: int, memory: int) -> None:
    spans = cut_waves(np.array(rows, np.int64), WaveLimits(users, memory, cost))
    assert [user for start, stop in spans for user in range(start, stop)] == list(range(len(rows)))

    def bytes_of(start: int, stop: int) -> int:
        part = rows[start:stop]
        return cost(sum(row > 0 for row in part), sum(part), sum(row == 0 for row in part))

    for start, stop in spans:
        assert 1 <= stop - start <= users
        assert stop - start == 1 or bytes_of(start, stop) <= memory
        full = stop == len(rows) or stop - start == users or bytes_of(start, stop + 1) > memory
        assert full, "a wave that ends early wastes a segment"


@given(partitions=st.integers(1, 50), ranks=st.integers(1, 60))
def test_every_partition_has_exactly_one_owner(partitions: int, ranks: int) -> None:
    owned = [partition for rank in range(ranks) for partition in owned_partitions(partitions, rank, ranks)]
    assert sorted(owned) == list(range(partitions))
