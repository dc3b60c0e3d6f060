"""Fitting users from a few examples each, all of them together; everything shared stays as it is.

By the solver that fitted the generation: Newton's method in one pass over the examples, or a bounded number of Adam steps.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from plora_ray.adapters.adam import UserRows, fit_adam
from plora_ray.adapters.fit import solve_users
from plora_ray.adapters.objective import task_losses
from plora_ray.inference.example_passes import ExamplePasses
from plora_ray.inference.loading import LoadedGeneration
from plora_ray.inference.reach import within

ADAM_STEPS = 20  # of one user at most, however many examples: an answer is waited for


@dataclass(frozen=True)
class Examples:
    """One user's examples. labels: as data files give them (class names or numbers). start: the user's trained vector
    [user_width], which new examples move on from; None for a new user, who starts from the prior's mean or the population."""

    texts: Sequence[str]
    labels: Sequence[str | float]
    start: np.ndarray | None = None


@dataclass(frozen=True)
class Fit:
    """vector: [user_width] float32. Losses: mean over the user's examples, with what he had before and with the new vector."""

    vector: np.ndarray
    loss_before: float
    loss_after: float


class FewShotFitter:
    """Fits users on one loaded generation. Threads may share it.

    farthest: what is fitted further from the population is scaled back onto this bound (`reach.within`).
    """

    def __init__(self, loaded: LoadedGeneration, *, batch_tokens: int = 4096, batch_rows: int = 64, farthest: float = math.inf) -> None:
        self._loaded, self._farthest = loaded, farthest
        self._batch_tokens, self._batch_rows = max(batch_tokens, loaded.max_length), batch_rows
        self._lock = threading.Lock()  # the model's user context belongs to one pass at a time

    def fit_many(self, users: Sequence[Examples]) -> list[Fit]:
        """Every user's vector, pulled towards the user's `start`. Raises DataError for an unknown label.

        Every user needs at least one example; users don't influence each other.
        """
        if not users:
            return []
        loaded = self._loaded
        task = loaded.labels.task
        labels = torch.cat([loaded.labels.encode(list(user.labels)) for user in users])
        owners = torch.repeat_interleave(torch.arange(len(users)), torch.tensor([len(user.texts) for user in users]))
        ids = loaded.encode([text for user in users for text in user.texts])
        with self._lock:
            nobody = loaded.model.population_vector().cpu()
            had = torch.stack([nobody if user.start is None else torch.tensor(user.start) for user in users])
            passes = ExamplePasses(loaded, ids, max_tokens=self._batch_tokens, max_rows=self._batch_rows)
            if loaded.fit.solver == "newton":
                fitted = self._newton(users, passes, labels, owners, had)
            else:
                fitted = self._adam(users, passes, labels, owners, had)
            fitted = within(loaded, fitted, had, self._farthest)
            before, after = (task_losses(passes.user_logits(vectors, owners), labels, task) for vectors in (had, fitted))
        return [
            Fit(fitted[place].numpy(), before[owners == place].mean().item(), after[owners == place].mean().item())
            for place in range(len(users))
        ]

    def _newton(self, users: Sequence[Examples], passes: ExamplePasses, labels: Tensor, owners: Tensor, had: Tensor) -> Tensor:
        """Posterior modes [users, d] under the generation's prior, centred at each user's start; `had`, whom the guard leaves at that.

        A start is kept as far as it lasts already, and what newer examples add to it counts in full.
        """
        prior, task = self._loaded.prior, self._loaded.labels.task
        assert prior is not None
        fitted = torch.empty(len(users), len(prior.mean))
        for group in _groups(users):
            start = users[group[0]].start
            centred = prior if start is None else replace(prior, mean=torch.tensor(start).double(), lasting=1.0)
            rows = torch.from_numpy(np.flatnonzero(np.isin(owners.numpy(), group)))
            linear = passes.linearise(rows.numpy(), centred.mean)
            local = owners[rows] - group[0]
            fallback = had[group] if self._loaded.fit.guard else None
            fitted[group] = solve_users(linear, torch.arange(len(rows)), labels[rows], local, len(group), centred, task, fallback).vectors
        return fitted

    def _adam(self, users: Sequence[Examples], passes: ExamplePasses, labels: Tensor, owners: Tensor, had: Tensor) -> Tensor:
        """Vectors [users, user_width] after each user's own Adam steps from `had`, or, for new vectors, from the prior's mean."""
        loaded = self._loaded
        starts: Tensor = had
        precision: Tensor | float = loaded.fit.pull
        if loaded.prior is not None:
            new = torch.tensor([user.start is None for user in users]).unsqueeze(1)
            starts = torch.where(new, loaded.prior.mean.float(), had)
            precision = loaded.prior.precision * loaded.prior.noise_variance
        rows = UserRows(torch.arange(len(labels)), owners, labels, torch.from_numpy(passes.lengths))
        none = UserRows(rows.rows[:0], owners[:0], labels[:0], rows.lengths[:0])
        steps = replace(loaded.fit.steps, max_steps=ADAM_STEPS)
        seeds = [0] * len(users)
        return fit_adam(passes, rows, none, starts.to(loaded.device), precision, seeds, steps, loaded.labels.task).vectors.cpu()


def _groups(users: Sequence[Examples]) -> list[list[int]]:
    """Places of users to solve together, in order: new users share a starting point, a known user has his own."""
    groups: list[list[int]] = []
    for place, user in enumerate(users):
        if groups and user.start is None and users[groups[-1][-1]].start is None:
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups
