"""Passes of a loaded generation's model over tokenised examples, in batches of bounded tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from plora_ray.adapters.fit import Linearisation, linearise
from plora_ray.adapters.packing import Pack
from plora_ray.data.batches import token_budget_batches
from plora_ray.inference.engine import pad
from plora_ray.inference.loading import LoadedGeneration


class ExamplePasses:
    """ids: token ids of each row. max_tokens, max_rows bound a batch."""

    def __init__(self, loaded: LoadedGeneration, ids: Sequence[Sequence[int]], *, max_tokens: int, max_rows: int) -> None:
        self._loaded, self._ids = loaded, ids
        self.lengths = np.array([len(row) for row in ids])
        self.max_tokens, self.max_rows = max_tokens, max_rows

    def logits(self, rows: Tensor, vectors: Tensor) -> Tensor:
        """Logits [batch, outputs] of rows [batch] with users' vectors [users, user_width], differentiable."""
        ids, mask = self._padded(rows.numpy())
        logits: Tensor = self._loaded.model(ids, mask, vectors.to(ids.device))
        return logits

    def in_step(self, packs: list[Pack]) -> Iterable[Pack | None]:
        """`packs`: one process has nobody to keep in step with."""
        return packs

    @torch.no_grad()
    def user_logits(self, vectors: Tensor, owners: Tensor) -> Tensor:
        """Logits [rows, outputs] of all rows with the vectors [users, user_width] of their `owners` [rows]."""
        result = torch.empty(len(self._ids), self._loaded.model.spec.outputs)
        for rows in self._batches(np.arange(len(self._ids))):
            result[rows] = self.logits(torch.from_numpy(rows), vectors[owners[rows]]).cpu()
        return result

    def linearise(self, rows: np.ndarray, point: Tensor) -> Linearisation:
        """Linearisation of `rows`, in their order, at `point` [d]."""
        place = {int(row): index for index, row in enumerate(rows)}
        logits: list[Tensor] = [torch.empty(0)] * len(rows)
        jacobians: list[Tensor] = [torch.empty(0)] * len(rows)
        for batch in self._batches(rows):
            z, j = linearise(self._loaded.model, *self._padded(batch), point.float(), self._loaded.labels.task)
            for row, logit, jacobian in zip(batch, z.cpu(), j.cpu(), strict=True):
                logits[place[int(row)]], jacobians[place[int(row)]] = logit, jacobian
        return Linearisation(point.float(), torch.stack(logits), torch.stack(jacobians))

    def _batches(self, rows: np.ndarray) -> list[np.ndarray]:
        groups = token_budget_batches(self.lengths[rows], max_tokens=self.max_tokens, max_rows=self.max_rows, shuffle_seed=None)
        return [rows[group] for group in groups]

    def _padded(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        device = self._loaded.device
        input_ids, mask = pad([self._ids[row] for row in rows], self._loaded.tokenizer.pad_token_id or 0)
        return input_ids.to(device), mask.to(device)
