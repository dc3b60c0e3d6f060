"""The made-up population: deterministic, in need of personalisation, and honest about its ceilings."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest

from plora_ray.data.synthetic import SyntheticParams, ceilings, new_user, rows_of_user, true_probability
from plora_ray.errors import DataError

PARAMS = SyntheticParams(users=400, texts=16, seed=3, pool=200)


def test_a_user_is_the_same_whoever_was_generated_before() -> None:
    first = rows_of_user(PARAMS, 42)
    rows_of_user(PARAMS, 1)
    assert rows_of_user(PARAMS, 42) == first and first[0].user_id == "user-00042"
    assert rows_of_user(PARAMS.model_copy(update={"seed": 4}), 42) != first


def test_a_text_lies_in_one_split_and_every_user_has_rows_in_all() -> None:
    split_of: dict[str, set[str]] = defaultdict(set)
    for user in range(100):
        rows = rows_of_user(PARAMS, user)
        assert Counter(row.split for row in rows) == {"train": 10, "validation": 2, "test": 4}
        assert len({row.text for row in rows}) == 16
        for row in rows:
            split_of[row.text].add(row.split)
            assert 8 <= len(row.text.split()) <= 20
    assert all(len(splits) == 1 for splits in split_of.values())


def test_ceilings_agree_with_the_answers_users_give() -> None:
    hits_with, hits_without, like_share = [], [], defaultdict(list)
    tests = [(user, row) for user in range(PARAMS.users) for row in rows_of_user(PARAMS, user) if row.split == "test"]
    for text in {row.text for _, row in tests}:
        like_share[text] = [true_probability(PARAMS, user, text) for user in range(0, PARAMS.users, 4)]
    for user, row in tests:
        hits_with.append((true_probability(PARAMS, user, row.text) >= 0.5) == (row.label == "like"))
        hits_without.append((np.mean(like_share[row.text]) >= 0.5) == (row.label == "like"))
    ceiling = ceilings(PARAMS)
    error = 3 / np.sqrt(len(tests)) / 2
    assert abs(np.mean(hits_with) - ceiling.with_user) < error
    assert abs(np.mean(hits_without) - ceiling.without_user) < error + 0.01


@pytest.mark.parametrize("seed", range(5))
def test_knowing_the_user_is_what_makes_the_difference(seed: int) -> None:
    ceiling = ceilings(SyntheticParams(users=300, seed=seed))
    assert 0.84 < ceiling.with_user < 0.91
    assert 0.62 < ceiling.without_user < 0.72
    assert ceiling.with_user - ceiling.without_user > 0.15


def test_a_new_user_is_beyond_the_population() -> None:
    assert {row.user_id for row in new_user(PARAMS, 5)} == {"user-00405"}


def test_a_wrong_parameter_is_named_with_the_valid_ones() -> None:
    with pytest.raises(DataError, match="people.*valid keys: users, texts"):
        SyntheticParams.from_url("synthetic://?people=3")
    with pytest.raises(DataError, match="use pool=120"):
        SyntheticParams.from_url("synthetic://?texts=30&pool=20")
    assert SyntheticParams.from_url("synthetic://").users == 1000
