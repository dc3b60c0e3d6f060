"""The guard's estimate against fits that really leave each row out, and whom it sends back to the population."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from plora_ray.adapters.fit import Linearisation, UserPrior, solve_users
from plora_ray.adapters.leave_one_out import EVIDENCE_NATS, left_out_gains
from plora_ray.adapters.model import Task
from plora_ray.adapters.problem import FitProblem
from tests.adapters.test_fit import DIM, prior, random_problem

OTHER = torch.linspace(-0.2, 0.3, DIM, dtype=torch.float64)


def loss(linear: Linearisation, text: int, label: torch.Tensor, p: torch.Tensor, noise: float, task: Task) -> float:
    """Of one row with a user vector [d], from the logits themselves."""
    free = linear.jacobian[text].double() @ (p.double() - linear.point.double())
    if task == "regression":
        return float(0.5 * (linear.logits[text, 0].double() + free[0] - label.double()) ** 2 / noise)
    logits = linear.logits[text].double() + F.pad(free, (0, 1))
    return float(F.cross_entropy(logits, label))


def refitted(
    linear: Linearisation, texts: torch.Tensor, labels: torch.Tensor, users: torch.Tensor, chosen: UserPrior, task: Task,
    weights: torch.Tensor,
) -> np.ndarray:  # fmt: skip
    """[rows]: what each row gains over OTHER by the vector of a fit that never saw it."""
    gains = []
    for row in range(len(texts)):
        rest = (users == users[row]) & (torch.arange(len(texts)) != row)
        nobody_else = torch.zeros(int(rest.sum()), dtype=torch.int64)
        without = solve_users(linear, texts[rest], labels[rest], nobody_else, 1, chosen, task, weights=weights[rest]).vectors[0]
        text, label = int(texts[row]), labels[row]
        gains.append(
            loss(linear, text, label, OTHER, chosen.noise_variance, task) - loss(linear, text, label, without, chosen.noise_variance, task)
        )
    return np.array(gains)


@pytest.mark.parametrize(("lasting", "old"), [(1.0, 1.0), (0.6, 1.0), (1.0, 0.5), (0.6, 0.5)])
@pytest.mark.parametrize(("task", "classes"), [("regression", 1), ("classification", 2), ("classification", 4)])
def test_what_rows_gain_left_out_is_what_fits_without_them_gain(task: Task, classes: int, lasting: float, old: float) -> None:
    tolerance = 1e-5 if task == "regression" else 0.03
    linear, texts, labels, users = random_problem(classes, 4, 60, max(classes, 2))
    if task == "regression":
        linear = Linearisation(linear.point, linear.logits[:, :1], linear.jacobian[:, :1])
        labels = torch.randn(60, generator=torch.Generator().manual_seed(1))
    chosen = UserPrior(prior().mean, 4 * prior().precision, 0.7, lasting)
    weights = torch.where(torch.arange(60) % 2 == 0, 1.0, old).double()
    problem = FitProblem(linear, texts, labels, users, 4, chosen, task, weights)
    modes = solve_users(linear, texts, labels, users, 4, replace(chosen, lasting=1.0), task, weights=weights).vectors.double()
    found = left_out_gains(problem, modes, torch.linalg.cholesky(problem.derivatives(modes)[1]), OTHER)
    gains = weights.numpy() * refitted(linear, texts, labels, users, chosen, task, weights)
    for user in range(4):
        mine = gains[users.numpy() == user]
        assert len(mine) > 5 and abs(mine.sum()) > 5 * tolerance
        assert float(found[user]) == pytest.approx(mine.sum(), abs=tolerance * len(mine))
    evidence = np.array([gains[users.numpy() == user].sum() for user in range(4)])
    fitted = solve_users(linear, texts, labels, users, 4, chosen, task, OTHER, weights)
    clear = np.abs(evidence + EVIDENCE_NATS) > tolerance * 20
    assert (fitted.guarded.numpy() == (evidence < -EVIDENCE_NATS))[clear].all() and clear.sum() >= 3


def test_a_user_whose_labels_are_noise_falls_back_and_a_user_with_a_taste_stays() -> None:
    """Forty users, of whom every other one labels by his own taste and the rest at random, under a prior as wide as the tastes."""
    generator = torch.Generator().manual_seed(3)
    users, each = 40, 30
    linear = Linearisation(torch.zeros(DIM), torch.zeros(users * each, 2), torch.randn(users * each, 1, DIM, generator=generator))
    owners = torch.arange(users).repeat_interleave(each)
    tastes = 1.5 * torch.randn(users, DIM, generator=generator) * (torch.arange(users) % 2 == 0).unsqueeze(1)
    chance = torch.sigmoid((linear.jacobian[:, 0] * tastes[owners]).sum(1))
    labels = 1 - (torch.rand(users * each, generator=generator) < chance).long()
    wide = UserPrior(torch.zeros(DIM, dtype=torch.float64), torch.eye(DIM, dtype=torch.float64) / 1.5**2)
    rows = torch.arange(users * each)
    nobody = torch.zeros(DIM)
    plain = solve_users(linear, rows, labels, owners, users, wide, "classification")
    fitted = solve_users(linear, rows, labels, owners, users, wide, "classification", nobody)
    with_taste, with_noise = fitted.guarded[::2], fitted.guarded[1::2]
    assert int(with_taste.sum()) <= 1 and int(with_noise.sum()) >= 12
    assert bool((fitted.vectors[fitted.guarded] == 0).all()), "exactly the population"
    assert torch.equal(fitted.vectors[~fitted.guarded], plain.vectors[~fitted.guarded]) and not bool(plain.guarded.any())
    each_its_own = torch.randn(users, DIM, generator=generator) * 1e-6
    left = solve_users(linear, rows, labels, owners, users, wide, "classification", each_its_own)
    assert torch.equal(left.guarded, fitted.guarded) and torch.equal(left.vectors[left.guarded], each_its_own[left.guarded])
