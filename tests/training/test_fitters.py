"""What fits a wave: the same users whatever the blocks, and Adam under Newton's prior."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from plora_ray.adapters import leave_one_out
from plora_ray.adapters.adam import AdamSteps
from plora_ray.adapters.calibration import SCALES, best_scale, scale_losses
from plora_ray.adapters.fit import UserPrior, solve_users
from plora_ray.adapters.forgetting import Forgetting, days_of
from plora_ray.adapters.labels import LabelSpace
from plora_ray.adapters.lasting import SHARES
from plora_ray.adapters.model import AdapterSpec, PersonalizedModel
from plora_ray.data.table import PartitionTable
from plora_ray.training import fitters
from plora_ray.training import passes as passes_module
from plora_ray.training.calibration import calibrate
from plora_ray.training.fitters import AdamFitter, NewtonFitter, newton_blocks
from plora_ray.training.passes import FrozenPasses
from plora_ray.training.prior import estimate_prior
from plora_ray.training.rank_rows import RankRows
from plora_ray.training.user_table import UserTable
from tests.adapters.tiny import plm

DIM, USERS = 5, 12
PRIOR = UserPrior(torch.full((DIM,), 0.1, dtype=torch.float64), 0.3 * torch.eye(DIM, dtype=torch.float64))


class OneRank:
    """A rank that has nobody to keep in step with."""

    device = torch.device("cpu")

    def lockstep(self, items: list[Any], idle: Any) -> Iterator[tuple[Any, bool, int]]:
        return ((item, True, len(items)) for item in items)


@pytest.fixture
def rows() -> RankRows:
    return rows_of()


def rows_of(*, fit_validation: bool = True, times: np.ndarray | None = None) -> RankRows:
    """Users of 1 to 12 rows, every fourth row held out; some random texts several rows have, some only one."""
    generator = np.random.default_rng(0)
    counts, total = np.arange(1, USERS + 1), USERS * (USERS + 1) // 2
    pool = [generator.integers(3, 100, length).astype(np.int32) for length in generator.integers(2, 9, 60)]
    texts = [pool[place] for place in generator.integers(0, len(pool), total)]
    lengths = np.array([len(text) for text in texts])
    table = PartitionTable(
        keys=np.sort(generator.integers(0, 256, (USERS, 16)).astype(np.uint8), axis=0),
        user_offsets=np.concatenate([[0], np.cumsum(counts)]),
        tokens=np.concatenate(texts),
        row_offsets=np.concatenate([[0], np.cumsum(lengths)]),
        labels=generator.choice(np.array(["x", "y", "z"], object), total),
        split=(np.arange(total) % 4 == 3).astype(np.int8),
        timestamps=np.full(total, np.datetime64("NaT", "us")) if times is None else times,
    )
    return RankRows({0: table}, LabelSpace("classification", ("x", "y", "z")), frozenset(), 0, fit_validation=fit_validation)


@pytest.fixture
def passes(rows: RankRows) -> FrozenPasses:
    spec = AdapterSpec(model="tiny", task="classification", outputs=3, rank=2, alpha=4.0, user_dim=DIM)
    model = PersonalizedModel(plm("bert"), spec).eval()
    with torch.no_grad():
        for parameter in model.shared_parameters().values():
            parameter.normal_(std=0.4, generator=torch.Generator().manual_seed(1))
    model.requires_grad_(False)
    return FrozenPasses(OneRank(), model, rows, batch_tokens=64, batch_rows=8)  # type: ignore[arg-type]


def test_newton_in_blocks_of_bounded_memory_finds_what_it_finds_at_once(
    rows: RankRows, passes: FrozenPasses, monkeypatch: pytest.MonkeyPatch
) -> None:
    newton, users = NewtonFitter(passes, rows, PRIOR, "classification"), np.unique(rows.row_users[rows.of_split("train")])
    whole = newton.fit(users)
    monkeypatch.setattr(fitters, "NEWTON_BLOCK_BYTES", 4000)
    assert 3 < len(newton_blocks(users, rows.to_fit(users), rows, DIM, 3)) <= len(users)
    blocks = newton.fit(users)
    assert torch.allclose(blocks.vectors, whole.vectors, atol=1e-5) and whole.vectors.shape == (USERS, DIM)
    assert torch.allclose(blocks.remaining, whole.remaining, atol=1e-5) and bool((whole.remaining < 1).all())
    assert newton.fit(users[:0]).vectors.shape == (0, DIM), "an idle wave"


def test_newton_fits_a_user_on_training_and_validation_rows_together(rows: RankRows, passes: FrozenPasses) -> None:
    user = np.array([USERS - 1])
    own = np.flatnonzero(rows.row_users == user[0])
    linear, texts = passes.linearise(own, PRIOR.mean)
    expected = solve_users(linear, texts, rows.labels[own], torch.zeros(len(own), dtype=torch.int64), 1, PRIOR, "classification")
    assert torch.allclose(NewtonFitter(passes, rows, PRIOR, "classification").fit(user).vectors, expected.vectors, atol=1e-5)


def test_newton_counts_dated_rows_by_their_age_and_keeps_what_lasts_of_such_fits(passes: FrozenPasses) -> None:
    old = np.arange(USERS * (USERS + 1) // 2) % 2 == 0
    dated = rows_of(times=np.where(old, np.datetime64("2020-01-01", "us"), np.datetime64("2020-01-11", "us")))
    forgetful = replace(PRIOR, lasting=0.1, forgetting=Forgetting(5.0, float(days_of(dated.times).max()), 0.8))
    own = np.flatnonzero(dated.row_users == USERS - 1)
    linear, texts = passes.linearise(own, PRIOR.mean)
    problem = linear, texts, dated.labels[own], torch.zeros(len(own), dtype=torch.int64), 1, replace(PRIOR, lasting=0.8), "classification"
    expected = solve_users(*problem, weights=torch.from_numpy(np.where(old[own], 0.25, 1.0)))
    found = NewtonFitter(passes, dated, forgetful, "classification").fit(np.array([USERS - 1]))
    assert torch.allclose(found.vectors, expected.vectors, atol=1e-5)
    assert not torch.allclose(found.vectors, solve_users(*problem).vectors, atol=1e-3)


def test_what_a_users_rows_count_does_not_depend_on_who_else_is_fitted(passes: FrozenPasses) -> None:
    years = np.where(np.arange(USERS * (USERS + 1) // 2) >= USERS * (USERS - 1) // 2, 0, 4)  # the last user's rows are the oldest
    dated = rows_of(times=np.datetime64("2020-01-01", "us") + (365 * years).astype("timedelta64[D]"))
    forgetful = replace(PRIOR, forgetting=Forgetting(400.0, float(days_of(dated.times).max())))
    user = np.array([USERS - 1])
    among_all = NewtonFitter(passes, dated, forgetful, "classification").fit(user).vectors
    dated.mark_erased({key.tobytes() for key in dated.keys[:-1]})
    assert torch.allclose(NewtonFitter(passes, dated, forgetful, "classification").fit(user).vectors, among_all, atol=1e-6)
    assert not torch.allclose(NewtonFitter(passes, dated, PRIOR, "classification").fit(user).vectors, among_all, atol=1e-3)


def test_validation_rows_that_are_to_judge_are_not_fitted(rows: RankRows) -> None:
    assert len(rows.to_fit(None)) > len(rows.of_split("train")) == len(rows_of(fit_validation=False).to_fit(None))


def test_guarded_users_get_the_populations_vector_whatever_the_blocks_and_nobody_else_changes(
    rows: RankRows, passes: FrozenPasses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leave_one_out, "EVIDENCE_NATS", 0.0)  # few rows of few users: any loss is to count
    users = np.unique(rows.row_users[rows.of_split("train")])
    plain = NewtonFitter(passes, rows, PRIOR, "classification").fit(users)
    guarded = NewtonFitter(passes, rows, PRIOR, "classification", guard=True).fit(users)
    back = guarded.guarded
    assert 0 < int(back.sum()) < USERS and not bool(plain.guarded.any())
    assert bool((guarded.vectors[back] == 0).all()) and torch.allclose(guarded.vectors[~back], plain.vectors[~back], atol=1e-5)
    monkeypatch.setattr(fitters, "NEWTON_BLOCK_BYTES", 4000)
    assert torch.equal(NewtonFitter(passes, rows, PRIOR, "classification", guard=True).fit(users).guarded, back)


def test_adam_moves_users_towards_what_newton_finds_and_each_as_alone(rows: RankRows, passes: FrozenPasses) -> None:
    users = np.unique(rows.row_users[rows.of_split("train")])[:5]
    steps = AdamSteps(epochs=25, learning_rate=0.1, patience=100)
    adam = AdamFitter(passes, rows, PRIOR.mean, PRIOR.precision, steps, "classification")
    newton = NewtonFitter(passes, rows, PRIOR, "classification").fit(users).vectors - PRIOR.mean.float()
    found = adam.fit(users)
    moved = found.vectors - PRIOR.mean.float()
    none_held_out = [user for user in users if not len(rows.of_split("validation", np.array([user])))]
    for user in none_held_out:
        assert torch.cosine_similarity(moved[user], newton[user], dim=0) > 0.9
    assert none_held_out and torch.isnan(found.remaining).all()
    assert torch.allclose(adam.fit(users[4:5]).vectors[0], found.vectors[4], atol=1e-5)


def test_the_passes_keep_no_more_bytes_than_they_may_and_forget_nothing_that_they_return(
    rows: RankRows, passes: FrozenPasses, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = rows.of_split("train")
    whole, texts = passes.linearise(train, PRIOR.mean)
    monkeypatch.setattr(passes_module, "CACHE_BYTES", 8_000)
    small = FrozenPasses(OneRank(), passes._model, rows, batch_tokens=64, batch_rows=8)  # type: ignore[arg-type]
    for _ in range(2):  # the second time some texts are known and some were dropped
        linear, index = small.linearise(train, PRIOR.mean)
        assert torch.allclose(linear.logits, whole.logits, atol=1e-6) and torch.allclose(linear.jacobian, whole.jacobian, atol=1e-6)
        assert torch.equal(index, texts)
    kept = dict(small._cache)
    assert 0 < len(kept) < len(whole.logits)
    held = sum(sys.getsizeof(name) + sys.getsizeof(numbers) for name, numbers in kept.items())
    assert held <= 8_000 and all(numbers.base is None for numbers in kept.values()), "a view keeps its whole batch alive"


def test_only_texts_that_several_rows_to_fit_have_are_kept(rows: RankRows, passes: FrozenPasses) -> None:
    train = rows.to_fit(None)
    passes.linearise(train, PRIOR.mean)
    by_tokens: dict[bytes, list[int]] = {}
    for row in train:
        ids, mask = rows.inputs(np.array([row]))
        by_tokens.setdefault(ids[mask.bool()].numpy().tobytes(), []).append(int(row))
    shared = {int(rows.texts[held[0]]) for held in by_tokens.values() if len(held) > 1}
    assert set(passes._cache) == shared and 0 < len(shared) < len(by_tokens)
    assert all(len(set(rows.texts[held])) == 1 for held in by_tokens.values()) and len(set(rows.texts[train])) == len(by_tokens)


@pytest.mark.parametrize("average", [None, torch.arange(DIM, dtype=torch.float64)])
def test_the_population_as_it_will_answer_is_as_sure_as_the_validation_rows_of_all_users_allow(
    rows: RankRows, passes: FrozenPasses, alone: None, average: torch.Tensor | None
) -> None:
    held_out = np.flatnonzero(np.arange(USERS * (USERS + 1) // 2) % 4 == 3)
    losses = torch.zeros(len(SCALES), dtype=torch.float64)
    learnt = rows.labels[rows.of_split("train")].tolist()
    base = [np.log((learnt.count(label) + 1) / (len(learnt) + 3)) for label in range(3)]
    for row in held_out:
        ids, mask = rows.inputs(np.array([row]))
        with torch.no_grad():
            losses += scale_losses(passes._model(ids, mask, None if average is None else average[None].float()), rows.labels[[row]], base)
    found = calibrate(passes, rows, average)
    assert found.scale == best_scale(losses) < 1 and found.base == pytest.approx(base)


def test_the_prior_is_the_same_whether_its_users_are_looked_at_together_or_in_blocks_of_bounded_memory(
    rows: RankRows, passes: FrozenPasses, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = UserTable(USERS, DIM, learning_rate=0.1)
    table.vectors.normal_(generator=torch.Generator().manual_seed(2))
    table.steps[:] = 1
    whole = estimate_prior(table, passes, rows, "classification")
    monkeypatch.setattr(fitters, "NEWTON_BLOCK_BYTES", 4000)
    blocks = estimate_prior(table, passes, rows, "classification")
    assert torch.allclose(blocks.mean, whole.mean, atol=1e-8) and torch.allclose(blocks.precision, whole.precision, rtol=1e-6)
    assert blocks.lasting == whole.lasting


def test_validation_rows_say_how_much_lasts_of_what_training_rows_say_of_users(rows: RankRows, passes: FrozenPasses, alone: None) -> None:
    table = UserTable(USERS, DIM, learning_rate=0.1)
    table.vectors.normal_(generator=torch.Generator().manual_seed(2))
    table.steps[:] = 1
    found = estimate_prior(table, passes, rows, "classification")
    point = found.mean
    surprise = (1 - SHARES) ** 2 / (2 * 0.25**2)
    for user in range(USERS):
        own, later = (rows.of_split(split, np.array([user])) for split in ("train", "validation"))
        if len(own) and len(later):
            linear, texts = passes.linearise(own, point)
            alone_user = texts, rows.labels[own], torch.zeros(len(own), dtype=torch.int64)
            way = solve_users(linear, *alone_user, 1, replace(found, lasting=1.0), "classification").vectors[0].double() - found.mean
            linear, texts = passes.linearise(later, point)
            for place, share in enumerate(SHARES.tolist()):
                moved = linear.jacobian[texts].double() @ (found.mean + share * way - point)
                logits = linear.logits[texts].double() + torch.nn.functional.pad(moved, (0, 1))
                surprise[place] += torch.nn.functional.cross_entropy(logits, rows.labels[later], reduction="sum")
    assert found.lasting < 1, "these labels are chance"
    assert found.lasting == pytest.approx(float(SHARES[int(torch.argmin(surprise))]), abs=0.011)
