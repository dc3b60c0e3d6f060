"""What fits the users of a wave: Newton's method on the linearised model, or Adam on the model itself."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from plora_ray.adapters.adam import AdamSteps, UserRows, fit_adam
from plora_ray.adapters.fit import FittedUsers, Linearisation, UserPrior, solve_users
from plora_ray.adapters.fit_memory import NEWTON_BLOCK_BYTES, newton_row_bytes, newton_user_bytes
from plora_ray.adapters.model import Task
from plora_ray.training.passes import FrozenPasses
from plora_ray.training.rank_rows import RankRows

NO_ROWS = np.empty(0, np.int64)
Examples = tuple[Linearisation, Tensor, Tensor, Tensor, int]  # the first arguments of `solve_users`


class WaveFitter(Protocol):
    """Fits users with everything shared frozen."""

    def fit(self, users: np.ndarray) -> FittedUsers:
        """Fit `users` [users] (ascending, of the rank) on their rows.

        Where the model is sharded, all ranks must call, one that has nothing left to do with no users.
        """


@dataclass(frozen=True)
class LinearRows:
    """Rows `chosen` [n], ascending, of a rank, linearised at one point; texts: [n], each one's row of `linear`."""

    rows: RankRows
    chosen: np.ndarray
    linear: Linearisation
    texts: Tensor

    @classmethod
    def at(cls, point: Tensor, chosen: np.ndarray, passes: FrozenPasses, rows: RankRows) -> LinearRows:
        """Where the model is sharded, all ranks must call."""
        return cls(rows, chosen, *passes.linearise(chosen, point))

    def examples(self, users: np.ndarray, own: np.ndarray) -> Examples:
        """`own` rows of `users` for a solver."""
        local = torch.from_numpy(np.searchsorted(users, self.rows.row_users[own]))
        return self.linear, self.texts[np.searchsorted(self.chosen, own)], self.rows.labels[own], local, len(users)


class NewtonFitter:
    """Posterior modes of user vectors under `prior`, given all of `RankRows.to_fit`, in blocks of users of bounded memory.

    Rows count by their age if the prior says so. guard: users whom their mode harms get the population's vector, which is zero.
    """

    def __init__(self, passes: FrozenPasses, rows: RankRows, prior: UserPrior, task: Task, *, guard: bool = False) -> None:
        self._passes, self._rows, self._prior, self._task = passes, rows, prior.of_dated_rows(), task
        self._fallback = torch.zeros(len(prior.mean)) if guard else None

    def fit(self, users: np.ndarray) -> FittedUsers:
        own, parts = self._rows.to_fit(users), []
        for block in self._passes.in_step(newton_blocks(users, own, self._rows, len(self._prior.mean), self._passes.outputs)):
            mine, rows = block or (NO_ROWS, NO_ROWS)
            linear = LinearRows.at(self._prior.mean, rows, self._passes, self._rows)
            if block is not None:
                examples, weights = linear.examples(mine, rows), self._weights(rows)
                parts.append(solve_users(*examples, self._prior, self._task, self._fallback, weights))
        if not parts:
            nobody = torch.empty(0, dtype=torch.bool)
            return FittedUsers(torch.empty(0, len(self._prior.mean)), nobody, torch.empty(0), nobody)
        return FittedUsers(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(FittedUsers)))

    def _weights(self, rows: np.ndarray) -> Tensor | None:
        forgetting = self._prior.forgetting
        return None if forgetting is None else forgetting.weights(self._rows.times[rows])


def newton_blocks(users: np.ndarray, own: np.ndarray, rows: RankRows, dim: int, outputs: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Users and their `own` rows, both ascending, in blocks of about NEWTON_BLOCK_BYTES, at least one user each."""
    starts = np.searchsorted(rows.row_users[own], users)
    stops = np.append(starts[1:], len(own)) if len(users) else starts
    held = newton_user_bytes(dim) + (stops - starts) * newton_row_bytes(dim, outputs)
    blocks, first, total = [], 0, 0
    for place, size in enumerate(held.tolist()):
        if place > first and total + size > NEWTON_BLOCK_BYTES:
            blocks.append((users[first:place], own[starts[first] : starts[place]]))
            first, total = place, 0
        total += size
    if len(users):
        blocks.append((users[first:], own[starts[first] :]))
    return blocks


class AdamFitter:
    """Users by their own Adam, from `start` [width] and pulled towards it with `precision` [width, width] or lambda.

    Learns from training rows; users with validation rows stop early on those.
    """

    def __init__(
        self, passes: FrozenPasses, rows: RankRows, start: Tensor, precision: Tensor | float, steps: AdamSteps, task: Task
    ) -> None:
        self._passes, self._rows, self._steps, self._task = passes, rows, steps, task
        self._start, self._precision = start.float().to(passes.device), precision

    def fit(self, users: np.ndarray) -> FittedUsers:
        train, held_out = (self._rows.of_split(split, users) for split in ("train", "validation"))
        seeds = [int.from_bytes(self._rows.keys[user].tobytes()[:8], "big") for user in users]
        found = fit_adam(
            self._passes, self._of(users, train), self._of(users, held_out), self._start, self._precision, seeds, self._steps, self._task
        )
        return replace(found, guarded=(found.vectors == 0).all(1))  # whose best epoch is nobody's vector, where that is zero

    def _of(self, users: np.ndarray, rows: np.ndarray) -> UserRows:
        local = np.searchsorted(users, self._rows.row_users[rows])
        lengths = torch.from_numpy(self._rows.lengths[rows])
        return UserRows(torch.from_numpy(rows), torch.from_numpy(local), self._rows.labels[rows], lengths)
