"""What lasts of what training rows say of users, as validation rows of all ranks judge it (`adapters/lasting.py`)."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist

from plora_ray.adapters.fit import UserPrior, solve_users
from plora_ray.adapters.forgetting import Forgetting
from plora_ray.adapters.lasting import SHARES, half_lives, likeliest, share_losses
from plora_ray.adapters.model import Task
from plora_ray.training.dates import newest_and_typical_age
from plora_ray.training.fitters import NO_ROWS, LinearRows, newton_blocks
from plora_ray.training.passes import FrozenPasses
from plora_ray.training.rank_rows import RankRows, first_users

JUDGES_ROWS = 8192  # all ranks together look at: an error of 0.1 in what lasts is worth more than one in a covariance
JUDGED_ROWS = 64  # validation rows of one user that tell it, so that nobody decides alone


def with_what_lasts(prior: UserPrior, passes: FrozenPasses, rows: RankRows, task: Task) -> UserPrior:
    """The prior with `lasting` and `forgetting`; all ranks must call. In blocks of users of bounded memory."""
    newest, typical_age = newest_and_typical_age(rows.times[rows.of_split("train")])
    tried = half_lives(typical_age)
    judges, losses = _judges(rows), torch.zeros(len(tried), len(SHARES), dtype=torch.float64)
    learnt = rows.of_split("train", judges)
    for block in passes.in_step(newton_blocks(judges, learnt, rows, len(prior.mean), passes.outputs)):
        users, own = block or (NO_ROWS, NO_ROWS)
        later = _first_of_each_user(rows, rows.of_split("validation", users), JUDGED_ROWS)
        linear = LinearRows.at(prior.mean, np.union1d(own, later), passes, rows)
        if block is None:
            continue
        fitted, judged, times = linear.examples(users, own), linear.examples(users, later), rows.times[own]
        for place, half_life in enumerate(tried):
            modes = solve_users(*fitted, prior, task, weights=Forgetting(half_life, newest).weights(times)).vectors
            losses[place] += share_losses(*judged, prior, task, modes)
    dist.all_reduce(losses)
    lasting, half_life, lasting_then = likeliest(losses, tried)
    if half_life == math.inf:
        return replace(prior, lasting=lasting)
    newest_to_fit, _ = newest_and_typical_age(rows.times[rows.to_fit(None)])
    return replace(prior, lasting=lasting, forgetting=Forgetting(half_life, newest_to_fit, lasting_then))


def _judges(rows: RankRows) -> np.ndarray:
    """The first users with training rows and validation rows that have this rank's share of JUDGES_ROWS of both together."""
    trained, held_out = (rows.count_by_user(rows.of_split(split)) for split in ("train", "validation"))
    return first_users(np.flatnonzero((trained > 0) & (held_out > 0)), trained + held_out, JUDGES_ROWS // dist.get_world_size())


def _first_of_each_user(rows: RankRows, own: np.ndarray, count: int) -> np.ndarray:
    """The first `count` of each user's rows among `own`, which lie by user."""
    users = rows.row_users[own]
    return own[np.arange(len(own)) - np.searchsorted(users, users) < count]
