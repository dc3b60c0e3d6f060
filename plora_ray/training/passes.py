"""Passes through the frozen model in the user stage: each different text once where the user doesn't matter.

At one common vector, logits and Jacobians depend on the text alone; a bounded cache keeps those of texts that several rows to fit
have, over users and waves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from cachetools import LRUCache
from torch import Tensor

from plora_ray.adapters.fit import Linearisation, linearise
from plora_ray.adapters.model import PersonalizedModel
from plora_ray.data.batches import token_budget_batches
from plora_ray.training.activations import Below, whole_passes
from plora_ray.training.engine import ShardedTrainer
from plora_ray.training.rank_rows import RankRows

Item = TypeVar("Item")

CACHE_BYTES = 256 * 2**20
ENTRY_BYTES = 1024  # what an entry holds beside its numbers: the array's head, the number that names it, the cache's own records


class FrozenPasses:
    """Forward and backward passes of one rank, in step with the other ranks where the model is sharded.

    below: see LowerActivations.under.
    """

    def __init__(
        self,
        trainer: ShardedTrainer,
        model: PersonalizedModel,
        rows: RankRows,
        *,
        batch_tokens: int,
        batch_rows: int,
        below: Below = whole_passes,
    ) -> None:
        self._trainer, self._model, self._rows, self._below = trainer, model, rows, below
        self.max_tokens, self.max_rows = batch_tokens, batch_rows
        self._point: Tensor | None = None
        self._cache: LRUCache[int, np.ndarray] = LRUCache(CACHE_BYTES, getsizeof=lambda value: value.nbytes + ENTRY_BYTES)

    @property
    def outputs(self) -> int:
        """Logits a row."""
        return self._model.spec.outputs

    @property
    def leanings(self) -> int:
        """How many of a vector's last numbers the task head hears as its user's leanings."""
        return self._model.spec.leanings

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self._trainer.device

    def in_step(self, items: list[Item]) -> Iterator[Item | None]:
        """`items`, then None until every rank has gone through as many, where the model is sharded."""
        waiting: list[Item | None] = [*items]
        return (item for item, _, _ in self._trainer.lockstep(waiting, None))

    def logits(self, rows: Tensor, vectors: Tensor) -> Tensor:
        """Logits [batch, outputs] of rows [batch] with users' vectors [users, width], differentiable; one idle row if there are none."""
        ids, mask = self._rows.inputs(rows.numpy(), self.device)
        with self._below(rows.numpy(), ids, mask):
            logits: Tensor = self._model(ids, mask, vectors.to(self.device))
        return logits

    def linearise(self, rows: np.ndarray, point: Tensor) -> tuple[Linearisation, Tensor]:
        """Linearisation at `point` [d] of the different texts of `rows`, and for each row its text's index [rows]."""
        if self._point is None or not torch.equal(self._point, point):
            self._cache.clear()
            self._point = point.clone()
        texts, firsts, index = self._distinct(rows)
        outputs, dim = self._model.spec.outputs, len(point)
        free = 1 if self._model.spec.task == "regression" else outputs - 1
        found = np.empty((len(firsts), outputs + free * dim), np.float32)
        wanted = []
        for place, text in enumerate(texts.tolist()):
            kept = self._cache.get(text)
            if kept is None:
                wanted.append(place)
            else:
                found[place] = kept
        places = np.array(wanted, np.int64)
        for batch, real in self._batches(places, self._rows.lengths[firsts[places]]):
            ids, mask = self._rows.inputs(firsts[batch], self._trainer.device)
            with self._below(firsts[batch], ids, mask):
                logits, jacobian = linearise(self._model, ids, mask, point.float(), self._model.spec.task)
            if real:
                found[batch] = torch.cat([logits, jacobian.flatten(1)], dim=1).cpu().numpy()
        for place in wanted:
            if self._comes_again[texts[place]] and found[place].nbytes + ENTRY_BYTES <= self._cache.maxsize:
                self._cache[int(texts[place])] = found[place].copy()
        numbers = torch.from_numpy(found)
        linear = Linearisation(point.float(), numbers[:, :outputs], numbers[:, outputs:].reshape(len(firsts), free, dim))
        return linear, torch.from_numpy(index)

    def population_logits(self, rows: np.ndarray) -> Tensor:
        """Logits [rows, outputs] with no user; each different text is computed once."""
        _, firsts, index = self._distinct(rows)
        return self._forward(firsts, None)[torch.from_numpy(index)]

    def user_logits(self, rows: np.ndarray, vectors: Tensor, owners: Tensor) -> Tensor:
        """Logits [rows, outputs] of rows with the vectors [users, width] of their `owners` [rows]."""
        return self._forward(rows, lambda places: vectors[owners[places]] if len(places) else torch.zeros(1, vectors.shape[1]))

    @torch.no_grad()
    def _forward(self, rows: np.ndarray, vectors_of: Callable[[np.ndarray], Tensor] | None) -> Tensor:
        result = torch.empty(len(rows), self._model.spec.outputs)
        for places, real in self._batches(np.arange(len(rows)), self._rows.lengths[rows]):
            ids, mask = self._rows.inputs(rows[places], self._trainer.device)
            vectors = None if vectors_of is None else vectors_of(places).to(self._trainer.device)
            with self._below(rows[places], ids, mask):
                logits = self._model(ids, mask, vectors)
            if real:
                result[places] = logits.cpu()
        return result

    def _batches(self, items: np.ndarray, lengths: np.ndarray) -> list[tuple[np.ndarray, bool]]:
        """Batches of `items`, whose texts have `lengths` [items] tokens, with idle passes while other ranks still work."""
        groups = token_budget_batches(lengths, max_tokens=self.max_tokens, max_rows=self.max_rows, shuffle_seed=None)
        batches = [items[group] for group in groups]
        return [(batch, real) for batch, real, _ in self._trainer.lockstep(batches, np.empty(0, np.int64))]

    @cached_property
    def _comes_again(self) -> np.ndarray:
        """[texts] bool: whether several rows to fit have the text; what one row has needn't be kept for another."""
        texts = self._rows.texts
        return np.bincount(texts[self._rows.to_fit(None)], minlength=int(texts.max(initial=-1)) + 1) > 1

    def _distinct(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The different texts among `rows`, a row that has each, and each row's index into them."""
        texts, firsts, index = np.unique(self._rows.texts[rows], return_index=True, return_inverse=True)
        return texts, rows[firsts], index
