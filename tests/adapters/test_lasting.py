"""How much of what is found of users lasts, against plain torch and people who are known to change."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from plora_ray.adapters import leave_one_out
from plora_ray.adapters.fit import Linearisation, UserPrior, solve_users
from plora_ray.adapters.lasting import SHARES, likeliest, share_losses
from tests.adapters.test_fit import DIM, prior, random_problem


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), st.integers(2, 4), st.booleans())
def test_the_losses_are_those_of_rows_under_vectors_that_far_from_the_mean(seed: int, classes: int, regression: bool) -> None:
    linear, texts, labels, users = random_problem(seed, 3, 20, 2 if regression else classes)
    chosen, modes = replace(prior(seed), noise_variance=0.4), torch.randn(3, DIM, generator=torch.Generator().manual_seed(seed))
    if regression:
        linear = Linearisation(linear.point, linear.logits[:, :1], linear.jacobian)
        labels = labels.float()
    found = share_losses(linear, texts, labels, users, 3, chosen, "regression" if regression else "classification", modes)
    for place in (0, 37, 99):
        vectors = chosen.mean + SHARES[place] * (modes.double() - chosen.mean)
        moved = torch.einsum("rfd,rd->rf", linear.jacobian.double()[texts], vectors[users] - linear.point.double())
        logits = linear.logits.double()[texts]
        if regression:
            expected = ((logits[:, 0] + moved[:, 0] - labels) ** 2).sum() / (2 * 0.4)
        else:
            expected = F.cross_entropy(torch.cat([logits[:, :-1] + moved, logits[:, -1:]], 1), labels, reduction="sum")
        assert found[place].item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("lasts", [0.3, 0.6, 1.0])
def test_of_people_who_change_the_share_is_found_that_stays(lasts: float) -> None:
    people, rows, generator = 400, 12, torch.Generator().manual_seed(3)
    before = torch.randn(people, DIM, generator=generator)
    other = torch.randn(people, DIM, generator=generator)
    after = lasts * before + (1 - lasts**2) ** 0.5 * other  # as varied as before
    users = torch.arange(people).repeat_interleave(rows)
    wide = UserPrior(torch.zeros(DIM).double(), torch.eye(DIM).double(), noise_variance=0.25)
    problems = []
    for vectors in (before, after):
        jacobian = torch.randn(len(users), 1, DIM, generator=generator)
        labels = torch.einsum("rd,rd->r", jacobian[:, 0], vectors[users]) + 0.5 * torch.randn(len(users), generator=generator)
        linear = Linearisation(torch.zeros(DIM), torch.zeros(len(users), 1), jacobian)
        problems.append((linear, torch.arange(len(users)), labels, users, people))
    modes = solve_users(*problems[0], wide, "regression").vectors
    found, *_ = likeliest(share_losses(*problems[1], wide, "regression", modes).unsqueeze(0), [math.inf])
    assert found == pytest.approx(lasts, abs=0.06)


def test_without_rows_to_say_otherwise_everything_lasts() -> None:
    linear, texts, labels, users = random_problem(0, 3, 20, 3)
    none = share_losses(linear, texts[:0], labels[:0], users[:0], 3, prior(), "classification", torch.randn(3, DIM))
    assert likeliest(none.unsqueeze(0), [math.inf]) == (1.0, math.inf, 1.0)


def test_a_handful_of_rows_moves_the_share_little() -> None:
    linear = Linearisation(torch.zeros(1), torch.zeros(1, 2), torch.ones(1, 1, 1))
    only = UserPrior(torch.zeros(1).double(), torch.eye(1).double())
    against = torch.ones(1, dtype=torch.int64)  # the free logit is of class 0
    once = share_losses(
        linear, torch.zeros(1, dtype=torch.int64), against, torch.zeros(1, dtype=torch.int64), 1, only, "classification", torch.ones(1, 1)
    )
    found, many = (likeliest(times * once.unsqueeze(0), [math.inf])[0] for times in (1, 500))
    assert 0.9 < found < 1 and many == SHARES[0]


def test_users_are_kept_as_far_from_the_mean_as_they_last_and_whom_the_guard_leaves_to_the_fallback_are_not_moved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    linear, texts, labels, users = random_problem(1, 4, 30, 3)
    chosen, fallback = prior(1), torch.full((DIM,), 9.0)
    modes = solve_users(linear, texts, labels, users, 4, chosen, "classification").vectors
    fading = replace(chosen, lasting=0.4)
    expected = chosen.mean + 0.4 * (modes.double() - chosen.mean)
    assert torch.allclose(solve_users(linear, texts, labels, users, 4, fading, "classification").vectors, expected.float(), atol=1e-5)
    monkeypatch.setattr(leave_one_out, "EVIDENCE_NATS", -1e9)  # whoever they are
    guarded = solve_users(linear, texts, labels, users, 4, fading, "classification", fallback)
    assert bool(guarded.guarded.all()) and torch.equal(guarded.vectors, fallback.expand(4, -1))


def test_a_prior_from_before_there_was_a_share_is_read_as_if_all_lasted() -> None:
    named = replace(prior(), lasting=0.25).tensors()
    assert UserPrior.from_tensors(named).lasting == 0.25
    del named["prior.lasting"]
    assert UserPrior.from_tensors(named).lasting == 1.0
