"""Fitting users by gradient descent: many users in one pass, each with its own Adam, on its own rows.

    min_v  mean_rows loss(z(v), label) + 1/(2 n) (v - v0)^T C^-1 (v - v0)        v0: where the user starts; n: its rows

The same objective as fit.py's, divided by the user's rows, but of the true model: it needs no linear logits, so it fits
private matrices (C^-1 = lambda I) as well as vectors. A step of a user uses some of the user's own rows, in an order
drawn from the user's own seed: who else is fitted at the same time changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from plora_ray.adapters.fit import FittedUsers
from plora_ray.adapters.model import Task
from plora_ray.adapters.objective import task_losses
from plora_ray.adapters.packing import Pack, Share, cut_by_length, pack_shares

BETAS = (0.9, 0.999)
EPSILON = 1e-8
LAST_RATE = 0.1  # of the learning rate, which falls linearly over a user's steps


@dataclass(frozen=True)
class AdamSteps:
    """How users are fitted.

    epochs: passes over a user's rows. learning_rate: at a user's first step. rows_per_step: of one user. patience: epochs
    without a lower loss on the user's validation rows after which it stops; whoever has none makes all epochs. max_steps: of one
    user, however many rows it has; None sets no bound.
    """

    epochs: int = 10
    learning_rate: float = 1e-3
    rows_per_step: int = 16
    patience: int = 3
    max_steps: int | None = None


@dataclass(frozen=True)
class UserRows:
    """Rows of many users. rows: [n] what a pass calls them; users: [n] in 0..count-1, ascending; labels, lengths (tokens): [n]."""

    rows: Tensor
    users: Tensor
    labels: Tensor
    lengths: Tensor


class Passes(Protocol):
    """What runs the model on rows it knows, in batches of at most max_tokens padded tokens and max_rows rows."""

    max_tokens: int
    max_rows: int

    def logits(self, rows: Tensor, vectors: Tensor) -> Tensor:
        """[batch, outputs] of `rows` [batch] with vectors [users, width], batch / users adjacent rows each, differentiable.

        Without rows: one row of no meaning, for a pass that only keeps ranks in step.
        """

    def in_step(self, packs: list[Pack]) -> Iterable[Pack | None]:
        """`packs`, then None until every rank has made as many passes."""


def fit_adam(
    passes: Passes,
    train: UserRows,
    held_out: UserRows,
    start: Tensor,
    precision: Tensor | float,
    seeds: list[int],
    steps: AdamSteps,
    task: Task,
) -> FittedUsers:
    """Fit every user of `seeds` from its start; all ranks must call where the model is sharded.

    start: [users, width], or [width] for all; also the centre of the pull. precision: C^-1 [width, width], or lambda. held_out: each
    user's validation rows; who has some keeps the vector of the epoch with the lowest loss on them, the start included.
    A user without training rows keeps its start. Work is done on `start`'s device; the vectors come back on the CPU.
    """
    fit = _Fit(passes, train, held_out, start, precision, seeds, steps, task)
    fit.validate(range(len(seeds)))
    while fit.step():
        pass
    vectors = torch.where(fit.best_loss.isfinite().unsqueeze(1), fit.best, fit.values) if fit.best is not None else fit.values
    nobody = torch.zeros(len(seeds), dtype=torch.bool)
    return FittedUsers(vectors.cpu(), torch.tensor(fit.stopped, dtype=torch.bool), torch.full((len(seeds),), torch.nan), nobody)


class _Fit:
    """Values, moments and schedule of all users of one fit."""

    def __init__(
        self, passes: Passes, train: UserRows, held_out: UserRows, start: Tensor, precision: Tensor | float,
        seeds: list[int], steps: AdamSteps, task: Task,
    ) -> None:  # fmt: skip
        count = len(seeds)
        self.passes, self.steps, self.task, self.seeds = passes, steps, task, seeds
        self.start = start.float()
        self.idle = torch.zeros(1, start.shape[-1], device=start.device)  # the vector of passes that only keep ranks in step
        self.precision = precision.float().to(start.device) if isinstance(precision, Tensor) else precision
        self.values = self.start.expand(count, -1).clone()
        self.first, self.second = torch.zeros_like(self.values), torch.zeros_like(self.values)
        self.train, self.held_out = _Users(train, count), _Users(held_out, count)
        self.best = self.values.clone() if len(held_out.rows) else None
        self.best_loss = torch.full((count,), torch.inf, device=start.device)
        self.done = [0] * count  # steps of each user
        self.stale = [0] * count  # epochs since the lowest validation loss
        self.stopped = [False] * count
        self.per_epoch = [self.train.shares(user, self._rows_per_step(user)) for user in range(count)]
        self.in_all = [min(steps.epochs * part, steps.max_steps or 2**31) for part in self.per_epoch]
        self.active = [user for user in range(count) if self.per_epoch[user]]
        self.orders: dict[int, Tensor] = {}

    def _rows_per_step(self, user: int) -> int:
        """As many as the settings say, and as fit into one pass with the user's longest row: what the user alone decides."""
        return max(1, min(self.steps.rows_per_step, self.passes.max_rows, self.passes.max_tokens // self.train.longest(user)))

    def step(self) -> bool:
        """One step of every user that isn't done; whether any rank made one."""
        shares = [share for user in self.active for share in self._next_shares(user)]
        gradient = torch.zeros(len(self.active), self.values.shape[1], device=self.values.device)
        places = {user: place for place, user in enumerate(self.active)}
        passed = False
        for pack in self.passes.in_step(pack_shares(shares, self.passes.max_tokens, self.passes.max_rows)):
            passed = True
            self._add_gradient(pack, gradient, places)
        for start in range(0, len(self.active), self.passes.max_rows):
            self._descend(self.active[start : start + self.passes.max_rows], gradient[start : start + self.passes.max_rows])
        for user in self.active:
            self.done[user] += 1
        ended = [user for user in self.active if self.done[user] % self.per_epoch[user] == 0]
        self.validate(ended)
        self.active = [user for user in self.active if self._goes_on(user)]
        return passed

    def _goes_on(self, user: int) -> bool:
        self.stopped[user] = self.stale[user] >= self.steps.patience
        return not self.stopped[user] and self.done[user] < self.in_all[user]

    def _next_shares(self, user: int) -> list[Share]:
        """The rows of the user's next step, a part of this epoch's order or all it has, in blocks of like lengths."""
        epoch, part = divmod(self.done[user], self.per_epoch[user])
        rows = self.train.rows_of(user)
        if self.per_epoch[user] > 1:
            if part == 0:
                generator = torch.Generator().manual_seed((self.seeds[user] + epoch * 0x9E3779B97F4A7C15) % 2**63)
                self.orders[user] = torch.randperm(len(rows), generator=generator)
            rows = rows[self.orders[user].tensor_split(self.per_epoch[user])[part]]
        return cut_by_length(user, rows, self.train.data.lengths[rows])

    def _add_gradient(self, pack: Pack | None, gradient: Tensor, places: dict[int, int]) -> None:
        """Add to `gradient` [active users, width] that of a pack's part of each user's mean loss; idle if there is no pack."""
        if pack is None:
            leaf = self.idle.clone().requires_grad_(True)
            torch.autograd.grad(self.passes.logits(torch.empty(0, dtype=torch.int64), leaf).sum(), leaf)
            return
        leaf = self.values[pack.users.to(self.values.device)].requires_grad_(True)
        with torch.enable_grad():
            losses = self._losses(pack, self.train, leaf)
            part = torch.autograd.grad((losses * pack.mean_weights.to(losses.device)).sum(), leaf)[0]
        gradient.index_add_(0, torch.tensor([places[int(user)] for user in pack.users], device=gradient.device), part)

    def _descend(self, active: list[int], gradient: Tensor) -> None:
        """One Adam step (Kingma & Ba 2015) of the users `active`, each by its own moments and step count."""
        device = self.values.device
        users = torch.tensor(active, device=device)
        values = self.values[users]
        centre = self.start if self.start.dim() == 1 else self.start[users]
        away = values - centre
        pull = away @ self.precision if isinstance(self.precision, Tensor) else away * self.precision
        counts = torch.tensor([len(self.train.rows_of(user)) for user in active], device=device).unsqueeze(1)
        gradient = gradient + pull / counts
        beta1, beta2 = BETAS
        first = self.first[users].mul_(beta1).add_(gradient, alpha=1 - beta1)
        second = self.second[users].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        self.first[users], self.second[users] = first, second
        done = torch.tensor([[self.done[user], self.in_all[user]] for user in active], device=device)
        taken = done[:, :1].double() + 1
        rate = self.steps.learning_rate * (1 - (1 - LAST_RATE) * done[:, :1].double() / done[:, 1:])
        size = (rate / (1 - beta1**taken)).float()
        denominator = second.div((1 - beta2**taken).float()).sqrt_().add_(EPSILON)
        self.values[users] = values - size * first / denominator

    def _losses(self, pack: Pack, users: _Users, vectors: Tensor) -> Tensor:
        """Loss of every place of a pack [users, rows each]; padding included."""
        places = pack.places.flatten()
        logits = self.passes.logits(users.data.rows[places], vectors)
        return task_losses(logits, users.data.labels[places].to(logits.device), self.task).view(pack.places.shape)

    @torch.no_grad()
    def validate(self, users: Iterable[int]) -> None:
        """Keep each user's values if its validation loss is its lowest. Every rank must call as often."""
        asked = [user for user in users if len(self.held_out.rows_of(user))]
        shares = [share for user in asked for share in self.held_out.all_shares(user, self.passes.max_tokens, self.passes.max_rows)]
        total = torch.zeros(len(self.seeds), device=self.values.device)
        for pack in self.passes.in_step(pack_shares(shares, self.passes.max_tokens, self.passes.max_rows)):
            if pack is None:
                self.passes.logits(torch.empty(0, dtype=torch.int64), self.idle)
                continue
            places = pack.users.to(self.values.device)
            losses = self._losses(pack, self.held_out, self.values[places])
            total.index_add_(0, places, (losses * (pack.mean_weights.to(losses.device) > 0)).sum(1).to(total.device))
        for user in asked:
            loss = total[user] / len(self.held_out.rows_of(user))
            assert self.best is not None
            if loss < self.best_loss[user]:
                self.best_loss[user], self.stale[user] = loss, 0
                self.best[user] = self.values[user]
            else:
                self.stale[user] += 1


class _Users:
    """Where each user's rows lie."""

    def __init__(self, data: UserRows, count: int) -> None:
        self.data = data
        bounds = torch.searchsorted(data.users.contiguous(), torch.arange(count + 1))
        self._bounds: list[int] = bounds.tolist()

    def rows_of(self, user: int) -> Tensor:
        """Places of the user's rows."""
        return torch.arange(self._bounds[user], self._bounds[user + 1])

    def longest(self, user: int) -> int:
        rows = self.rows_of(user)
        return int(self.data.lengths[rows].max()) if len(rows) else 1

    def shares(self, user: int, size: int) -> int:
        """Nearly equal parts of at most `size` rows."""
        return -(-len(self.rows_of(user)) // size)

    def all_shares(self, user: int, max_tokens: int, max_rows: int) -> list[Share]:
        """All of the user's rows in parts that fit into a pass."""
        longest = self.longest(user)
        parts = torch.split(self.rows_of(user), max(1, min(max_rows, max_tokens // longest)))
        return [share for part in parts for share in cut_by_length(user, part, self.data.lengths[part])]
