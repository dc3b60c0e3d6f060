"""Batches bounded by tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plora_ray.data.batches import pad_tokens, token_budget_batches
from plora_ray.errors import DataError


@given(
    st.lists(st.integers(1, 60), max_size=300),
    st.integers(64, 500),
    st.integers(1, 40),
    st.none() | st.integers(0, 5),
    st.sampled_from([1, 8]),
)
def test_every_row_is_in_one_batch_and_no_batch_exceeds_its_tokens_or_rows(
    lengths: list[int], max_tokens: int, max_rows: int, seed: int | None, multiple: int
) -> None:
    sizes = np.array(lengths, np.int64)
    batches = token_budget_batches(sizes, max_tokens, max_rows, seed, multiple)
    assert sorted(np.concatenate([np.empty(0, int), *batches])) == list(range(len(lengths)))
    for batch in batches:
        assert 1 <= len(batch) <= max_rows
        assert len(batch) * -(-sizes[batch].max() // multiple) * multiple <= max_tokens
    again = token_budget_batches(sizes, max_tokens, max_rows, seed, multiple)
    assert all(np.array_equal(one, other) for one, other in zip(batches, again, strict=True))


def test_another_seed_mixes_rows_otherwise_and_padding_stays_small() -> None:
    lengths = np.random.default_rng(0).geometric(0.05, 20_000).clip(max=128)
    first, second = (token_budget_batches(lengths, 2048, 256, seed) for seed in (1, 2))
    assert not np.array_equal(np.sort(first[0]), np.sort(second[0]))
    padded = sum(len(batch) * lengths[batch].max() for batch in first)
    assert padded < 1.1 * lengths.sum()
    assert len({int(lengths[batch].max()) for batch in first[:10]}) > 3  # long and short batches alternate


def test_a_row_over_the_budget_is_an_error_that_says_what_to_change() -> None:
    with pytest.raises(DataError, match="max_length"):
        token_budget_batches(np.array([5, 100]), max_tokens=64, max_rows=8, shuffle_seed=None)


def test_padding_reaches_the_batch_longest_and_no_further() -> None:
    tokens = np.array([7, 8, 9, 4, 5], np.int32)
    ids, mask = pad_tokens(tokens, np.array([3, 0]), np.array([2, 3]), pad_id=1)
    assert ids.tolist() == [[4, 5, 1], [7, 8, 9]] and mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    ids, mask = pad_tokens(tokens, np.array([3]), np.array([2]), pad_id=1, pad_to_multiple=8)
    assert ids.tolist() == [[4, 5] + [1] * 6] and mask.sum() == 2
