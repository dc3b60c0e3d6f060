"""Waves and ownership: every user once, whatever the number of workers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from plora_ray.training.waves import owned_partitions, plan_waves


@given(counts=st.lists(st.integers(0, 500), min_size=1, max_size=20), size=st.integers(1, 100))
def test_every_trainable_user_lies_in_exactly_one_wave_of_at_most_the_wanted_size(counts: list[int], size: int) -> None:
    waves = plan_waves(dict(enumerate(counts)), size)
    assert [wave.index for wave in waves] == list(range(len(waves)))
    covered = [(wave.partition, user) for wave in waves for user in range(wave.start, wave.stop)]
    assert covered == [(partition, user) for partition, users in enumerate(counts) for user in range(users)]
    assert all(1 <= wave.stop - wave.start <= size for wave in waves)


@given(partitions=st.integers(1, 50), ranks=st.integers(1, 60))
def test_every_partition_has_exactly_one_owner(partitions: int, ranks: int) -> None:
    owned = [partition for rank in range(ranks) for partition in owned_partitions(partitions, rank, ranks)]
    assert sorted(owned) == list(range(partitions))
