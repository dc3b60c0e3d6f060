"""Which rows an epoch of the population stage meets."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from plora_ray.training.population import draw_share


@given(rows=st.sets(st.integers(0, 10_000), max_size=200), fraction=st.floats(0.001, 1.0), seed=st.integers(0, 2**40))
def test_an_epoch_meets_the_wished_share_of_the_rows_each_once_and_never_none(rows: set[int], fraction: float, seed: int) -> None:
    drawn = draw_share(np.array(sorted(rows), np.int64), fraction, seed)
    assert set(drawn.tolist()) <= rows and len(set(drawn.tolist())) == len(drawn)
    assert len(drawn) == (max(1, round(fraction * len(rows))) if rows else 0)


def test_another_epoch_draws_other_rows_and_the_same_epoch_the_same() -> None:
    rows = np.arange(1000)
    assert np.array_equal(draw_share(rows, 0.1, 7), draw_share(rows, 0.1, 7))
    assert len(np.intersect1d(draw_share(rows, 0.1, 7), draw_share(rows, 0.1, 8))) < 50
