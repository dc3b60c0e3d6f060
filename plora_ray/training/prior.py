"""The prior of users' vectors, from the users themselves (empirical Bayes), over all ranks.

It starts from the moments of the vectors that the population stage found, at the scale that makes the users' labels likeliest,
and is then refined on the linearised model by expectation maximisation: what it says of users must be what their own rows
say of them. Moments alone measure where an optimiser with a step size and a number of epochs stopped.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.distributed as dist

from plora_ray.adapters.fit import PosteriorMoments, UserPrior, posterior_moments, prior_from_moments
from plora_ray.adapters.model import Task
from plora_ray.training.fitters import newton_blocks
from plora_ray.training.passes import FrozenPasses
from plora_ray.training.rank_rows import RankRows
from plora_ray.training.user_table import UserTable

SCALES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # of the moments' covariance, from which the best one is refined
MOST_STEPS = 10
ENOUGH_EVIDENCE = 1e-3  # a user, in nats: steps that gain less aren't worth their time
CALIBRATION_ROWS = 1024  # rows a rank looks at


def estimate_prior(table: UserTable, passes: FrozenPasses, rows: RankRows, task: Task) -> UserPrior:
    """The prior that all ranks agree on. All ranks must call; validation rows are welcome and not needed."""
    prior = prior_as_trained(table, rows)
    users, dim = _calibration_users(rows), len(prior.mean)
    chosen = rows.to_fit(users)
    linear, texts = passes.linearise(chosen, prior.mean)
    blocks = newton_blocks(users, chosen, rows, dim, passes.outputs)

    def moments_of(under: UserPrior, mine: np.ndarray, own: np.ndarray) -> PosteriorMoments:
        local = torch.from_numpy(np.searchsorted(mine, rows.row_users[own]))
        return posterior_moments(linear, texts[np.searchsorted(chosen, own)], rows.labels[own], local, len(mine), under, task)

    def posterior(under: UserPrior) -> PosteriorMoments:
        return _summed((moments_of(under, mine, own) for mine, own in blocks), dim)

    prior = max((prior.scaled(scale) for scale in SCALES), key=lambda scaled: posterior(scaled).log_evidence)
    before = posterior(prior)
    for _ in range(MOST_STEPS):
        refined = before.prior(prior)
        after = posterior(refined)
        if after.log_evidence - before.log_evidence < ENOUGH_EVIDENCE * after.users:
            break
        prior, before = refined, after
    return prior


def prior_as_trained(table: UserTable, rows: RankRows) -> UserPrior:
    """Mean and shrunk covariance of the vectors of all ranks' users whom the population stage met. All ranks must call."""
    met = table.vectors[(table.steps > 0) & ~torch.from_numpy(rows.erased)].double()
    dim = met.shape[1]
    sums = torch.cat([torch.tensor([float(len(met))], dtype=torch.float64), met.sum(0), (met.T @ met).flatten()])
    dist.all_reduce(sums)
    return prior_from_moments(int(sums[0]), sums[1 : dim + 1], sums[dim + 1 :].view(dim, dim))


def _calibration_users(rows: RankRows) -> np.ndarray:
    """The first users with training rows, in key order and so at random, that have CALIBRATION_ROWS rows together."""
    trained, counts = (np.bincount(rows.row_users[own], minlength=len(rows.keys)) for own in (rows.of_split("train"), rows.to_fit(None)))
    candidates = np.flatnonzero(trained)
    return candidates[: int(np.searchsorted(np.cumsum(counts[candidates]), CALIBRATION_ROWS)) + 1]


def _summed(parts: Iterable[PosteriorMoments], dim: int) -> PosteriorMoments:
    """The moments of this rank's groups of users, over all ranks."""
    sums = torch.zeros(4 + dim + dim * dim, dtype=torch.float64)
    for part in parts:
        scalars = torch.tensor([part.users, part.rows, part.squared_residuals, part.log_evidence], dtype=torch.float64)
        sums += torch.cat([scalars, part.total, part.outer.flatten()])
    dist.all_reduce(sums)
    users, rows, squared, evidence = sums[:4].tolist()
    return PosteriorMoments(int(users), sums[4 : dim + 4], sums[dim + 4 :].view(dim, dim), int(rows), squared, evidence)
