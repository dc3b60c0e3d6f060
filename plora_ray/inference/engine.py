"""One generation, ready to answer: tokenise, find each row's user vector, one mixed-user forward pass, decode.

No Ray, no HTTP: the same engine serves a replica, offline scoring and tests.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from plora_ray.adapters.labels import Prediction
from plora_ray.inference.batcher import Batcher
from plora_ray.inference.disk_tier import DiskTier
from plora_ray.inference.loading import LoadedGeneration
from plora_ray.inference.observer import EngineObserver
from plora_ray.inference.tiers import CacheOptions, Found, TieredAdapters
from plora_ray.store import UserAdapter

Personalization = Literal["adapter", "population"]

# What a pass costs beyond its tokens, in tokens. On a CPU core 4 ms beside 0.23 ms a token (MiniLM, 1 x 8 to 32 x 64 tokens); on a
# GPU, where small passes are bound by their launches, an estimate.
PASS_TOKENS = {"cpu": 20, "cuda": 8192}


@dataclass(frozen=True)
class Answer:
    """One answered row. reason: why a row was answered by the population although the store holds an adapter, or may hold one."""

    prediction: Prediction
    personalization: Personalization
    generation: str
    reason: str | None = None


@dataclass(frozen=True)
class PendingAnswers:
    """Rows on their way through the model: a future of logits [outputs] and what serves the user for each."""

    logits: list[Future[Tensor]]
    found: list[Found]


class InferenceEngine:
    """Answers rows of any mix of users. Threads may share it.

    batch_tokens, batch_rows, wait_s, queued_texts: see Batcher. cache_bytes, max_age_s, unknown_ttl_s, resident, store_wait_s, disk,
    pinned and prefetched (users' keys): see CacheOptions. compiled: the model is compiled by torch at its first batches.
    """

    def __init__(
        self,
        loaded: LoadedGeneration,
        *,
        batch_tokens: int = 4096,
        batch_rows: int = 64,
        wait_s: float = 0.0,
        queued_texts: int = 2**31,
        cache_bytes: int = 256 * 2**20,
        max_age_s: float = 30.0,
        unknown_ttl_s: float = 2.0,
        store_wait_s: float = 5.0,
        resident: Literal["auto", "on", "off"] = "off",
        disk: DiskTier | None = None,
        pinned: Sequence[bytes] = (),
        prefetched: Sequence[bytes] = (),
        compiled: bool = False,
        observer: EngineObserver | None = None,
    ) -> None:
        self.loaded = loaded
        self._observer = observer or EngineObserver()
        options = CacheOptions(cache_bytes, resident, max_age_s, unknown_ttl_s, store_wait_s, disk, pinned, prefetched)
        self.cache = TieredAdapters(loaded.store, loaded.reader, options, self._observer)
        self._nobody = loaded.model.population_vector().cpu().numpy()  # the record of rows without an adapter, in a batch with some
        self._pad_id = loaded.tokenizer.pad_token_id or 0
        self._device = loaded.device
        self._model: Callable[..., Tensor] = torch.compile(loaded.model, dynamic=True) if compiled else loaded.model
        self._batcher = Batcher(
            self._forward, max_tokens=batch_tokens, max_rows=batch_rows, wait_s=wait_s, max_queued=queued_texts,
            pass_tokens=PASS_TOKENS[self._device.type], observer=self._observer,
        )  # fmt: skip

    @property
    def generation(self) -> str:
        """The id of the generation that answers."""
        return self.loaded.name

    def predict(self, rows: Sequence[tuple[str, str]], at_least: str = "") -> list[Answer]:
        """Answers for (user_id, text) rows, in order. Blocks. Raises InvalidUserId and QueueFull.

        at_least: version token of an adaptation that these answers must have seen.
        """
        pending = self.submit(rows, at_least)
        return self.finish(pending, [future.result() for future in pending.logits])

    def submit(self, rows: Sequence[tuple[str, str]], at_least: str = "") -> PendingAnswers:
        """Tokenise, fetch adapters and queue; the futures hold each row's logits [outputs]."""
        found = [self._honest(one) for one in self.cache.find([self.loaded.store.key(user_id) for user_id, _ in rows], at_least)]
        ids = self.encode([text for _, text in rows])
        return PendingAnswers(self._batcher.submit([(row, one.record) for row, one in zip(ids, found, strict=True)]), found)

    def finish(self, pending: PendingAnswers, logits: Sequence[Tensor]) -> list[Answer]:
        """Answers from the rows' logits."""
        if not logits:
            return []
        predictions = self.loaded.labels.decode(torch.stack(list(logits)))
        for reason, rows in Counter(one.failure or "no_adapter" for one in pending.found if one.record is None).items():
            self._observer.on_population(reason, rows)
        return [
            Answer(prediction, "population" if one.record is None else "adapter", self.generation, one.failure)
            for prediction, one in zip(predictions, pending.found, strict=True)
        ]

    def _honest(self, found: Found) -> Found:
        """A vector of zeros, which the guard leaves to a user whom his fit would harm, is the population and says so."""
        is_population = self.loaded.prior is not None and found.record is not None and not found.record.any()
        return Found(None, "guarded") if is_population else found

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, cut to the generation's max_length."""
        return self.loaded.encode(texts)

    def score(self, ids: Sequence[Sequence[int]], vectors: Sequence[Tensor | None]) -> Tensor:
        """Logits [rows, outputs] of token ids with the given user vectors [user_width] or None, batched with whatever else is queued."""
        records = [None if vector is None else vector.numpy() for vector in vectors]
        return torch.stack([future.result() for future in self._batcher.submit(list(zip(ids, records, strict=True)))])

    def admit(self, adapter: UserAdapter) -> None:
        """Serve a freshly fitted adapter from now on, if it belongs to this generation's shared parameters."""
        if adapter.basis != self.loaded.reader.basis:
            return
        self.cache.put(adapter)
        if (erased := self.loaded.reader.erased_version(adapter.key)) is not None and erased >= adapter.version:
            self.cache.evict([adapter.key])  # erased between the fit and now

    def close(self) -> None:
        """Answer what is queued, then stop."""
        self._batcher.close()
        self.cache.close()

    @torch.inference_mode()
    def _forward(self, ids: Sequence[Sequence[int]], records: Sequence[np.ndarray | None]) -> Tensor:
        input_ids, mask = pad(ids, self._pad_id)
        users: Tensor | None = None
        if any(record is not None for record in records):
            flat = np.concatenate([self._nobody if record is None else record for record in records])
            users = torch.from_numpy(flat.reshape(len(records), -1)).to(self._device)
        return self._model(input_ids.to(self._device), mask.to(self._device), users).cpu()


def pad(ids: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask [rows, longest] int64, right-padded."""
    longest = max(1, max(map(len, ids)))
    padded = np.full((len(ids), longest), pad_id, np.int64)
    mask = np.zeros_like(padded)
    for place, row in enumerate(ids):
        padded[place, : len(row)] = row
        mask[place, : len(row)] = 1
    return torch.from_numpy(padded), torch.from_numpy(mask)
