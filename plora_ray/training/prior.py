"""The prior of users' vectors, from the users themselves (empirical Bayes), over all ranks.

It starts from the moments of the vectors that the population stage found, at the scale that makes the users' labels likeliest,
and is then refined on the linearised model by expectation maximisation: what it says of users must be what their own rows
say of them. Moments alone measure where an optimiser with a step size and a number of epochs stopped.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from plora_ray.adapters.fit import PosteriorMoments, UserPrior, posterior_moments, prior_from_moments
from plora_ray.adapters.model import Task
from plora_ray.training.passes import FrozenPasses
from plora_ray.training.rank_rows import RankRows
from plora_ray.training.user_table import UserTable

SCALES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # of the moments' covariance, from which the best one is refined
MOST_STEPS = 10
ENOUGH_EVIDENCE = 1e-3  # a user: steps that gain less change held-out likelihood in the fourth digit (docs/solver.md)
CALIBRATION_ROWS = 1024  # training rows a rank looks at


def estimate_prior(table: UserTable, passes: FrozenPasses, rows: RankRows, task: Task) -> UserPrior:
    """The prior that all ranks agree on. All ranks must call; needs no validation rows."""
    prior = _moments_of(table, rows)
    users = _calibration_users(rows)
    train = rows.of_split("train", users)
    linear, texts = passes.linearise(train, prior.mean)
    local = torch.from_numpy(np.searchsorted(users, rows.row_users[train]))

    def posterior(under: UserPrior) -> PosteriorMoments:
        return _summed(posterior_moments(linear, texts, rows.labels[train], local, len(users), under, task))

    prior = max((prior.scaled(scale) for scale in SCALES), key=lambda scaled: posterior(scaled).log_evidence)
    before = posterior(prior)
    for _ in range(MOST_STEPS):
        refined = before.prior(prior)
        after = posterior(refined)
        if after.log_evidence - before.log_evidence < ENOUGH_EVIDENCE * after.users:
            break
        prior, before = refined, after
    return prior


def _moments_of(table: UserTable, rows: RankRows) -> UserPrior:
    """Mean and shrunk covariance of the vectors of all ranks' users whom the population stage met."""
    met = table.vectors[(table.steps > 0) & ~torch.from_numpy(rows.erased)].double()
    dim = met.shape[1]
    sums = torch.cat([torch.tensor([float(len(met))], dtype=torch.float64), met.sum(0), (met.T @ met).flatten()])
    dist.all_reduce(sums)
    return prior_from_moments(int(sums[0]), sums[1 : dim + 1], sums[dim + 1 :].view(dim, dim))


def _calibration_users(rows: RankRows) -> np.ndarray:
    """The first users, in key order and so at random, that have CALIBRATION_ROWS training rows together."""
    counts = np.bincount(rows.row_users[rows.of_split("train")], minlength=len(rows.keys))
    candidates = np.flatnonzero(counts)
    return candidates[: int(np.searchsorted(np.cumsum(counts[candidates]), CALIBRATION_ROWS)) + 1]


def _summed(moments: PosteriorMoments) -> PosteriorMoments:
    """The moments over all ranks' users."""
    dim = len(moments.total)
    scalars = torch.tensor([moments.users, moments.rows, moments.squared_residuals, moments.log_evidence], dtype=torch.float64)
    sums: Tensor = torch.cat([scalars, moments.total, moments.outer.flatten()])
    dist.all_reduce(sums)
    users, rows, squared, evidence = sums[:4].tolist()
    return PosteriorMoments(int(users), sums[4 : dim + 4], sums[dim + 4 :].view(dim, dim), int(rows), squared, evidence)
