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

from plora_ray.adapters.fit import PosteriorMoments, UserPrior, posterior_moments, prior_from_moments, solve_users
from plora_ray.adapters.lasting import SHARES, likeliest_share, share_losses
from plora_ray.adapters.model import Task
from plora_ray.training.fitters import NO_ROWS, LinearRows, newton_blocks
from plora_ray.training.passes import FrozenPasses
from plora_ray.training.rank_rows import RankRows
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
JUDGES_ROWS = 8192  # all ranks together look at to tell what lasts: an error of 0.1 in that one number is worth more than in a covariance
JUDGED_ROWS = 64  # validation rows of one user that tell it, so that nobody decides alone


def estimate_prior(table: UserTable, passes: FrozenPasses, rows: RankRows, task: Task) -> UserPrior:
    """The prior that all ranks agree on. All ranks must call; validation rows are welcome and not needed."""
    trained, users = prior_as_trained(table, rows), _calibration_users(rows)
    fitted, dim = rows.to_fit(users), len(trained.mean)
    linear = LinearRows.at(trained.mean, fitted, passes, rows)
    blocks = newton_blocks(users, fitted, rows, dim, passes.outputs)

    def posterior(under: UserPrior) -> PosteriorMoments:
        return _summed((posterior_moments(*linear.examples(*block), under, task) for block in blocks), dim)

    prior = _refined(likeliest_start(trained, passes.leanings, posterior), posterior)
    return replace(prior, lasting=_lasting(prior, passes, rows, task))


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


def _lasting(prior: UserPrior, passes: FrozenPasses, rows: RankRows, task: Task) -> float:
    """What lasts of what training rows say of users, by validation rows of all ranks; in blocks of users of bounded memory."""
    judges, losses = _judges(rows), torch.zeros(len(SHARES), dtype=torch.float64)
    learnt = rows.of_split("train", judges)
    for block in passes.in_step(newton_blocks(judges, learnt, rows, len(prior.mean), passes.outputs)):
        users, own = block or (NO_ROWS, NO_ROWS)
        later = _first_of_each_user(rows, rows.of_split("validation", users), JUDGED_ROWS)
        linear = LinearRows.at(prior.mean, np.union1d(own, later), passes, rows)
        if block is not None:
            modes = solve_users(*linear.examples(users, own), prior, task).vectors
            losses += share_losses(*linear.examples(users, later), prior, task, modes)
    dist.all_reduce(losses)
    return likeliest_share(losses)


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
    trained, to_fit = (_rows_by_user(rows, own) for own in (rows.of_split("train"), rows.to_fit(None)))
    return _first_users(np.flatnonzero(trained), to_fit, CALIBRATION_ROWS)


def _judges(rows: RankRows) -> np.ndarray:
    """The first users with training rows and validation rows that have this rank's share of JUDGES_ROWS of both together."""
    trained, held_out = (_rows_by_user(rows, rows.of_split(split)) for split in ("train", "validation"))
    return _first_users(np.flatnonzero((trained > 0) & (held_out > 0)), trained + held_out, JUDGES_ROWS // dist.get_world_size())


def _first_users(candidates: np.ndarray, counts: np.ndarray, wanted: int) -> np.ndarray:
    """The first of `candidates`, in key order and so at random, that have so many rows together. counts: rows by user."""
    return candidates[: int(np.searchsorted(np.cumsum(counts[candidates]), wanted)) + 1]


def _first_of_each_user(rows: RankRows, own: np.ndarray, count: int) -> np.ndarray:
    """The first `count` of each user's rows among `own`, which lie by user."""
    users = rows.row_users[own]
    return own[np.arange(len(own)) - np.searchsorted(users, users) < count]


def _rows_by_user(rows: RankRows, own: np.ndarray) -> np.ndarray:
    return np.bincount(rows.row_users[own], minlength=len(rows.keys))


def _summed(parts: Iterable[PosteriorMoments], dim: int) -> PosteriorMoments:
    """The moments of this rank's groups of users, over all ranks."""
    sums = torch.zeros(4 + dim + dim * dim, dtype=torch.float64)
    for part in parts:
        scalars = torch.tensor([part.users, part.rows, part.squared_residuals, part.log_evidence], dtype=torch.float64)
        sums += torch.cat([scalars, part.total, part.outer.flatten()])
    dist.all_reduce(sums)
    users, rows, squared, evidence = sums[:4].tolist()
    return PosteriorMoments(int(users), sums[4 : dim + 4], sums[dim + 4 :].view(dim, dim), int(rows), squared, evidence)
