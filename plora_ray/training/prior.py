"""The prior of users' vectors, from the users themselves (empirical Bayes), over all ranks.

It starts from the moments of the vectors that the population stage found, at the scale that makes the users' labels likeliest, and
apart from it at the likeliest variance of their leanings (`TaskHead`). Then it is refined on the linearised model by expectation
maximisation: what it says of users must be what their own rows say of them. Moments alone measure where an optimiser with a step size
and a number of epochs stopped. Last, validation rows say how much of what is found in training rows lasts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache

import numpy as np
import torch
import torch.distributed as dist

from plora_ray.adapters.fit import PosteriorMoments, UserPrior, posterior_moments, prior_from_moments
from plora_ray.adapters.model import Task
from plora_ray.training.fitters import LinearRows, newton_blocks
from plora_ray.training.judging import with_what_lasts
from plora_ray.training.passes import FrozenPasses
from plora_ray.training.rank_rows import RankRows, first_users
from plora_ray.training.user_table import UserTable

SCALES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # of the moments' covariance, from which the best one is refined
VARIANCES = (1e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # of a leaning, in squared logits
LIKELY_VARIANCE = 0.1
SPREAD = 2.0  # standard deviation of both logarithms before any user is seen: enough to settle what a handful of users leaves open
NOISE_ROUNDS = 8
SETTLED = 0.1  # relative change of the noise that isn't worth another round: refining goes on from there
START_USERS = 64.0  # how many users the start weighs as much as, when it is refined
MOST_STEPS = 10
ENOUGH_EVIDENCE = 1e-3  # a user, in nats: steps that gain less aren't worth their time
CALIBRATION_ROWS = 2048  # rows a rank looks at


def estimate_prior(table: UserTable, passes: FrozenPasses, rows: RankRows, task: Task) -> UserPrior:
    """The prior that all ranks agree on. All ranks must call; validation rows are welcome and not needed."""
    trained, users = prior_as_trained(table, rows), _calibration_users(rows)
    fitted, dim = rows.to_fit(users), len(trained.mean)
    linear = LinearRows.at(trained.mean, fitted, passes, rows)
    blocks = newton_blocks(users, fitted, rows, dim, passes.outputs)

    def posterior(under: UserPrior) -> PosteriorMoments:
        return _summed((posterior_moments(*linear.examples(*block), under, task) for block in blocks), dim)

    prior = _refined(likeliest_start(trained, passes.leanings, posterior), posterior)
    return with_what_lasts(prior, passes, rows, task)


def _refined(start: UserPrior, posterior: Callable[[UserPrior], PosteriorMoments]) -> UserPrior:
    """Expectation maximisation from `start`, as long as it is worth its time."""
    prior, before = start, posterior(start)
    for _ in range(MOST_STEPS):
        refined = before.prior(prior, start, START_USERS)
        after = posterior(refined)
        if after.log_evidence - before.log_evidence < ENOUGH_EVIDENCE * after.users:
            break
        prior, before = refined, after
    return prior


def likeliest_start(trained: UserPrior, leanings: int, posterior: Callable[[UserPrior], PosteriorMoments]) -> UserPrior:
    """The likeliest of `trained` at SCALES, its last `leanings` numbers with VARIANCES.

    Apart from each other because a population stage moves all numbers of a vector by similar steps, however much users differ in what
    they stand for. posterior: of all ranks' users under a prior. A regression's noise is found in turn with them.
    """
    for _ in range(NOISE_ROUNDS):
        start = _uphill(trained, leanings, posterior)
        noise = posterior(start).noise_variance(start)
        settled = abs(noise - trained.noise_variance) < SETTLED * noise
        trained = replace(trained, noise_variance=noise)
        if settled:
            break
    return replace(start, noise_variance=noise)


def _uphill(trained: UserPrior, leanings: int, posterior: Callable[[UserPrior], PosteriorMoments]) -> UserPrior:
    """From the middle of the table of SCALES and VARIANCES, a step in each at a time, to where no neighbour is likelier."""

    @cache
    def surprise(place: tuple[int, int]) -> float:
        scale, variance = SCALES[place[0]], VARIANCES[place[1]]
        unlikely = (math.log(scale) ** 2 + math.log(variance / LIKELY_VARIANCE) ** 2) / (2 * SPREAD**2)
        return unlikely - posterior(trained.in_blocks(scale, leanings, variance)).log_evidence

    def around(place: tuple[int, int]) -> Iterator[tuple[int, int]]:
        steps = (-1, 0, 1) if leanings else (0,)
        near = ((place[0] + step, place[1] + other) for step in (-1, 0, 1) for other in steps)
        return ((scale, variance) for scale, variance in near if 0 <= scale < len(SCALES) and 0 <= variance < len(VARIANCES))

    place = (SCALES.index(1.0), VARIANCES.index(LIKELY_VARIANCE))
    while (better := min(around(place), key=surprise)) != place:
        place = better
    return trained.in_blocks(SCALES[place[0]], leanings, VARIANCES[place[1]])


def prior_as_trained(table: UserTable, rows: RankRows) -> UserPrior:
    """Mean and shrunk covariance of the vectors of all ranks' users whom the population stage met. All ranks must call."""
    met = table.vectors[(table.steps > 0) & ~torch.from_numpy(rows.erased)].double()
    dim = met.shape[1]
    sums = torch.cat([torch.tensor([float(len(met))], dtype=torch.float64), met.sum(0), (met.T @ met).flatten()])
    dist.all_reduce(sums)
    return prior_from_moments(int(sums[0]), sums[1 : dim + 1], sums[dim + 1 :].view(dim, dim))


def _calibration_users(rows: RankRows) -> np.ndarray:
    """The first users with training rows that have CALIBRATION_ROWS rows to fit together."""
    trained, to_fit = (rows.count_by_user(own) for own in (rows.of_split("train"), rows.to_fit(None)))
    return first_users(np.flatnonzero(trained), to_fit, CALIBRATION_ROWS)


def _summed(parts: Iterable[PosteriorMoments], dim: int) -> PosteriorMoments:
    """The moments of this rank's groups of users, over all ranks."""
    sums = torch.zeros(4 + dim + dim * dim, dtype=torch.float64)
    for part in parts:
        scalars = torch.tensor([part.users, part.rows, part.squared_residuals, part.log_evidence], dtype=torch.float64)
        sums += torch.cat([scalars, part.total, part.outer.flatten()])
    dist.all_reduce(sums)
    users, rows, squared, evidence = sums[:4].tolist()
    return PosteriorMoments(int(users), sums[4 : dim + 4], sums[dim + 4 :].view(dim, dim), int(rows), squared, evidence)
