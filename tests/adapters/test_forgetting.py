"""What rows count by their age, against rows that are there more or less often and fits by a general optimiser."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch.nn import functional as F

from plora_ray.adapters.fit import Linearisation, UserPrior, solve_users
from plora_ray.adapters.forgetting import Forgetting, days_of
from plora_ray.adapters.lasting import FORGETS, RATES, SHARES, half_lives, likeliest, share_losses
from tests.adapters.test_fit import DIM, prior, random_problem

NEWEST = datetime(2024, 3, 1, 12, tzinfo=UTC)


def at(days_before: float) -> np.ndarray:
    return np.array([np.datetime64(NEWEST.replace(tzinfo=None)) - np.timedelta64(int(days_before * 86_400), "s")], "datetime64[us]")


@settings(deadline=None)
@given(st.floats(0.01, 10_000), st.floats(-4000, 40_000))
def test_a_row_one_half_life_old_counts_half_and_a_newer_one_in_full(half_life: float, days: float) -> None:
    found = float(Forgetting(half_life, NEWEST.timestamp() / 86_400).weights(at(days)))
    assert found == pytest.approx(0.5 ** (max(days, 0.0) / half_life), rel=1e-3, abs=1e-9) and 0 <= found <= 1


def test_a_row_that_nobody_dated_counts_in_full() -> None:
    times = np.array([np.datetime64("NaT"), np.datetime64("2024-02-29T12:00")], "datetime64[us]")
    assert np.isnan(days_of(times)[0])
    assert Forgetting(1.0, NEWEST.timestamp() / 86_400).weights(times).tolist() == [1.0, 0.5]


def test_it_is_kept_with_the_prior_and_a_prior_from_before_forgets_nothing() -> None:
    named = replace(prior(), forgetting=Forgetting(12.5, 19_000.25, 0.75)).tensors()
    assert UserPrior.from_tensors(named).forgetting == Forgetting(12.5, 19_000.25, 0.75)
    assert UserPrior.from_tensors(prior().tensors()).forgetting is None


@pytest.mark.parametrize("classes", [2, 4])
def test_a_row_that_counts_twice_is_two_rows_and_one_that_counts_nothing_is_none(classes: int) -> None:
    linear, texts, labels, users = random_problem(3, 4, 40, classes)
    counts = torch.arange(40) % 3
    twice = torch.repeat_interleave(torch.arange(40), counts)
    weighted = solve_users(linear, texts, labels, users, 4, prior(), "classification", weights=counts.double())
    several = solve_users(linear, texts[twice], labels[twice], users[twice], 4, prior(), "classification")
    assert torch.allclose(weighted.vectors, several.vectors, atol=1e-5) and bool(weighted.converged.all())
    assert torch.allclose(weighted.remaining, several.remaining, atol=1e-5)


def test_rows_that_count_by_fractions_give_the_mode_that_a_general_optimiser_finds() -> None:
    linear, texts, labels, users = random_problem(5, 1, 25, 3)
    weights, chosen = torch.rand(25, generator=torch.Generator().manual_seed(2)).double(), prior(5)
    jacobian, logits = linear.jacobian.double()[texts], linear.logits.double()[texts]

    def objective(values: np.ndarray) -> float:
        p = torch.from_numpy(values)
        moved = logits + F.pad(jacobian @ (p - linear.point.double()), (0, 1))
        centred = p - chosen.mean
        losses = F.cross_entropy(moved, labels, reduction="none")
        return float((weights * losses).sum() + 0.5 * centred @ chosen.precision @ centred)

    expected = minimize(objective, chosen.mean.numpy(), method="BFGS", options={"gtol": 1e-9}).x
    found = solve_users(linear, texts, labels, users, 1, chosen, "classification", weights=weights).vectors[0]
    assert np.allclose(found.numpy(), expected, atol=1e-4)


def people_over_time(half_life: float | None, seed: int) -> float:
    """The half-life found of 300 people whose taste is a process with a memory, by what they say right after 16 days of rows."""
    people, days, generator = 300, 16, torch.Generator().manual_seed(seed)
    taste = torch.randn(people, DIM, generator=generator)
    kept = 1.0 if half_life is None else 0.5 ** (1 / half_life)
    problems, wide = [], UserPrior(torch.zeros(DIM).double(), torch.eye(DIM).double(), noise_variance=0.25)
    rows: dict[bool, list[tuple[torch.Tensor, torch.Tensor]]] = {True: [], False: []}
    for day in range(days + 2):
        jacobian = torch.randn(people, DIM, generator=generator)
        labels = (jacobian * taste).sum(1) + 0.5 * torch.randn(people, generator=generator)
        rows[day < days].append((jacobian, labels))
        taste = kept * taste + (1 - kept**2) ** 0.5 * torch.randn(people, DIM, generator=generator)
    for learnt in (True, False):
        jacobian, labels = (torch.cat(parts) for parts in zip(*rows[learnt], strict=True))
        linear = Linearisation(torch.zeros(DIM), torch.zeros(len(labels), 1), jacobian.unsqueeze(1))
        problems.append((linear, torch.arange(len(labels)), labels, torch.arange(people).repeat(len(rows[learnt])), people))
    times = np.repeat(np.datetime64("2024-01-01", "us") + np.arange(days) * np.timedelta64(1, "D"), people)
    tried, losses = half_lives(7.5), []
    for found in tried:
        weights = Forgetting(found, float(days_of(times).max())).weights(times)
        modes = solve_users(*problems[0], wide, "regression", weights=weights).vectors
        losses.append(share_losses(*problems[1], wide, "regression", modes))
    return likeliest(torch.stack(losses), tried)[1]


def test_of_people_who_change_old_rows_are_found_to_count_less_and_of_others_hardly_less() -> None:
    for seed in range(3):
        assert people_over_time(None, seed) >= 30, "a row of the first day counts 0.7 at least"
    slow, fast = people_over_time(12.0, 0), people_over_time(2.0, 0)
    assert 30 > slow > fast, "the faster they change, the shorter the half-life"


def test_a_half_life_needs_rows_that_speak_for_it_the_more_the_shorter_it_is() -> None:
    tried = half_lives(8.0)
    assert tried == [math.inf, 32.0, 16.0, 8.0, 4.0, 2.0, 1.0] and half_lives(0.0) == [math.inf]
    losses = torch.full((len(tried), len(SHARES)), 9.0, dtype=torch.float64)
    for place in (1, 6):
        speaks = losses.clone()
        speaks[place] -= FORGETS + RATES[place - 1] - 0.01
        assert likeliest(speaks, tried) == (1.0, math.inf, 1.0)
        speaks[place] -= 0.02
        assert likeliest(speaks, tried) == (1.0, tried[place], 1.0)
