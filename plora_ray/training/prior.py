"""The prior of users' vectors, from the users themselves (empirical Bayes), over all ranks.

It starts from the moments of the vectors that the population stage found, and is then fitted to the linearised model by
expectation maximisation: what it says of users must be what their own rows say of them. Moments alone measure where an
optimiser with a step size and a number of epochs stopped.
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

EM_STEPS = 5  # later ones change held-out likelihood in the fourth digit (docs/solver.md)
CALIBRATION_ROWS = 1024  # training rows a rank looks at


def estimate_prior(table: UserTable, passes: FrozenPasses, rows: RankRows, task: Task) -> UserPrior:
    """The prior that all ranks agree on. All ranks must call; needs no validation rows."""
    prior = _moments_of(table, rows)
    users = _calibration_users(rows)
    train = rows.of_split("train", users)
    linear, texts = passes.linearise(train, prior.mean)
    local = torch.from_numpy(np.searchsorted(users, rows.row_users[train]))
    for _ in range(EM_STEPS):
        moments = posterior_moments(linear, texts, rows.labels[train], local, len(users), prior, task)
        prior = _summed(moments).prior(prior)
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
    scalars = torch.tensor([moments.users, moments.rows, moments.squared_residuals], dtype=torch.float64)
    sums: Tensor = torch.cat([scalars, moments.total, moments.outer.flatten()])
    dist.all_reduce(sums)
    users, rows, squared = sums[:3].tolist()
    return PosteriorMoments(int(users), sums[3 : dim + 3], sums[dim + 3 :].view(dim, dim), int(rows), squared)
