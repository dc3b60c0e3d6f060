"""How much of what a fit has found of users holds on rows that it hasn't seen: one share and one half-life, chosen on such rows.

    p = mu + share (mode - mu)        mode: of rows that count less the older they are (`forgetting.py`)

A posterior mode is drawn to the prior's mean mu as far as its own rows leave it open. They can't tell that people change: where rows are
split by time, habits have moved on before the rows that are to be answered. And a mode answers as if it were certain, which goes too far
where rows are few. How steeply outcomes follow predictions says by how much (Cox 1958; van Houwelingen and le Cessie 1990, who shrink
by it). That rows of last week tell more than rows of years ago is found in the same way: by whichever half-life of rows answers
later ones best.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from plora_ray.adapters.fit import Linearisation, UserPrior
from plora_ray.adapters.model import Task
from plora_ray.adapters.problem import FitProblem

SHARES = torch.linspace(0.01, 1, 100, dtype=torch.float64)  # none is above 1: what the prior holds back isn't given on trust
SPREAD = 0.25  # standard deviation of the share around 1 before any row is seen: a handful of rows moves it little
RATES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # half-lives in the typical age of rows; before any row is seen each costs as many nats
FORGETS = 2.0  # nats more that it costs to forget at all


@torch.no_grad()
def share_losses(
    linear: Linearisation, texts: Tensor, labels: Tensor, users: Tensor, count: int, prior: UserPrior, task: Task, modes: Tensor
) -> Tensor:
    """Sum [len(SHARES)], float64, of the negative log-likelihood of users' rows at each share of what moves them from the prior's mean.

    modes: [users, d], fitted to other rows than these; other arguments as in `solve_users`.
    """
    problem = FitProblem(linear, texts, labels, users, count, prior, task)
    losses = torch.zeros(len(SHARES), dtype=torch.float64)
    for group in problem.groups:
        at_mean, at_mode = (problem.at(vectors, group)[1] for vectors in (prior.mean.expand(count, -1), modes.double()))
        own = problem.labels[group.rows]
        for place, share in enumerate(SHARES.tolist()):
            losses[place] += (problem.losses(torch.lerp(at_mean, at_mode, share), own) * group.weights).sum()
    return losses


def half_lives(typical_age: float) -> list[float]:
    """What is tried, in days: infinity, where rows have an age one of each of RATES, too."""
    return [math.inf, *(typical_age / rate for rate in RATES if typical_age > 0)]


def likeliest(losses: Tensor, half_lives: Sequence[float]) -> tuple[float, float, float]:
    """The likeliest share where all rows count the same, and the likeliest half-life, which may be infinite, with a share of its own.

    losses: [half_lives, shares], the sums that `share_losses` found, over all ranks. Shares are probably near 1, half-lives long.
    """
    best, places = (losses + (1 - SHARES) ** 2 / (2 * SPREAD**2)).min(dim=1)
    unlikely = torch.tensor([0.0, *(FORGETS + rate for rate in RATES)], dtype=torch.float64)
    chosen, shares = int(torch.argmin(best + unlikely[: len(losses)])), SHARES[places].tolist()
    return shares[0], half_lives[chosen], shares[chosen]
