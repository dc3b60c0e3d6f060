"""Fitting users from a few examples each, in one pass over all of them together; everything shared stays as it is."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from plora_ray.adapters.fit import Linearisation, UserPrior, linearise, solve_users
from plora_ray.adapters.objective import task_losses
from plora_ray.data.batches import token_budget_batches
from plora_ray.inference.engine import pad
from plora_ray.inference.loading import LoadedGeneration


@dataclass(frozen=True)
class Examples:
    """One user's examples. labels: as data files give them (class names or numbers). start: the user's trained vector
    [d], which new examples move on from; None for a new user, who starts from the population's prior."""

    texts: Sequence[str]
    labels: Sequence[str | float]
    start: np.ndarray | None = None


@dataclass(frozen=True)
class Fit:
    """vector: [d] float32. Losses: mean over the user's examples, with what he had before and with the new vector."""

    vector: np.ndarray
    loss_before: float
    loss_after: float


class FewShotFitter:
    """Fits users' vectors on one loaded generation. Threads may share it."""

    def __init__(self, loaded: LoadedGeneration, *, batch_tokens: int = 4096, batch_rows: int = 64) -> None:
        self._loaded = loaded
        self._batch_tokens, self._batch_rows = max(batch_tokens, loaded.max_length), batch_rows
        self._lock = threading.Lock()  # the model's user context belongs to one pass at a time

    def fit_many(self, users: Sequence[Examples]) -> list[Fit]:
        """Posterior modes under the generation's prior, centred at each user's `start`. Raises DataError for an unknown label.

        Every user needs at least one example; users don't influence each other.
        """
        with self._lock:
            return [fit for group in _groups(users) for fit in self._fit_group(group)]

    def _fit_group(self, users: Sequence[Examples]) -> list[Fit]:
        """Users with one common starting point are solved at once."""
        loaded = self._loaded
        task = loaded.labels.task
        labels = torch.cat([loaded.labels.encode(list(user.labels)) for user in users])
        owner = torch.repeat_interleave(torch.arange(len(users)), torch.tensor([len(user.texts) for user in users]))
        texts = [text for user in users for text in user.texts]
        ids = loaded.encode(texts)
        start = users[0].start
        prior = (
            loaded.prior
            if start is None
            else UserPrior(torch.tensor(start, dtype=torch.float64), loaded.prior.precision, loaded.prior.noise_variance)
        )
        linear = self._linearise(ids, prior.mean)
        fitted = solve_users(linear, torch.arange(len(ids)), labels, owner, len(users), prior, task).vectors
        had = torch.zeros(len(ids), loaded.user_dim) if start is None else prior.mean.float().expand(len(ids), -1)
        before, after = (task_losses(self._logits(ids, vectors), labels, task) for vectors in (had, fitted[owner]))
        return [
            Fit(fitted[place].numpy(), before[owner == place].mean().item(), after[owner == place].mean().item())
            for place in range(len(users))
        ]

    def _linearise(self, ids: list[list[int]], point: Tensor) -> Linearisation:
        logits: list[Tensor] = [torch.empty(0)] * len(ids)
        jacobians: list[Tensor] = [torch.empty(0)] * len(ids)
        for rows in self._batches(ids):
            z, j = linearise(self._loaded.model, *self._padded(ids, rows), point.float(), self._loaded.labels.task)
            for row, logit, jacobian in zip(rows, z.cpu(), j.cpu(), strict=True):
                logits[row], jacobians[row] = logit, jacobian
        return Linearisation(point.float(), torch.stack(logits), torch.stack(jacobians))

    @torch.no_grad()
    def _logits(self, ids: list[list[int]], vectors: Tensor) -> Tensor:
        result = torch.empty(len(ids), self._loaded.model.spec.outputs)
        for rows in self._batches(ids):
            input_ids, mask = self._padded(ids, rows)
            result[rows] = self._loaded.model(input_ids, mask, vectors[rows].to(input_ids.device)).cpu()
        return result

    def _batches(self, ids: list[list[int]]) -> list[np.ndarray]:
        lengths = np.array([len(row) for row in ids])
        return token_budget_batches(lengths, max_tokens=self._batch_tokens, max_rows=self._batch_rows, shuffle_seed=None)

    def _padded(self, ids: list[list[int]], rows: np.ndarray) -> tuple[Tensor, Tensor]:
        device = next(self._loaded.model.parameters()).device
        input_ids, mask = pad([ids[row] for row in rows], self._loaded.tokenizer.pad_token_id or 0)
        return input_ids.to(device), mask.to(device)


def _groups(users: Sequence[Examples]) -> list[list[Examples]]:
    """Runs of users to solve together, in order: new users share a starting point, a known user has his own."""
    groups: list[list[Examples]] = []
    for user in users:
        if groups and user.start is None and groups[-1][-1].start is None:
            groups[-1].append(user)
        else:
            groups.append([user])
    return groups
