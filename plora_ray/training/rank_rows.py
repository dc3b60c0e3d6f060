"""The rows of the partitions one rank owns, as flat arrays, and batches of them as tensors.

A row is one text with its label; a user is a contiguous run of rows. Knows nothing of models or storage formats.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Set
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from plora_ray.adapters.labels import LabelSpace
from plora_ray.data.batches import pad_tokens
from plora_ray.data.rows import SPLITS, SplitName
from plora_ray.data.table import PartitionTable
from plora_ray.errors import StoreError
from plora_ray.identity import KEY_BYTES, as_words

SPLIT_CODES: dict[SplitName, int] = {name: code for code, name in enumerate(SPLITS)}


@dataclass(frozen=True)
class Batch:
    """input_ids, attention_mask: [batch, tokens]; users: [batch] index into the rank's users (CPU); labels, weights: [batch]."""

    input_ids: Tensor
    attention_mask: Tensor
    users: Tensor
    labels: Tensor
    weights: Tensor


class RankRows:
    """Rows of a rank's partitions, in partition order.

    keys: [users, 16] uint8. partition_users: partition -> slice of its users. row_users: [rows] user of each row.
    lengths: [rows] tokens. labels: [rows] tensor. times: [rows] datetime64[us] in UTC, NaT where not given.
    erased: [users] bool; an erased user's rows are in no split. fit_validation: whether `to_fit` has validation rows.
    """

    def __init__(
        self, partitions: Mapping[int, PartitionTable], labels: LabelSpace, erased: Set[bytes], pad_id: int, *, fit_validation: bool = True
    ) -> None:
        tables = [partitions[index] for index in sorted(partitions)]
        self._pad_id = pad_id
        self._fit_splits: list[SplitName] = ["train", "validation"] if fit_validation else ["train"]
        self.partition_users: dict[int, slice] = {}
        start = 0
        for index in sorted(partitions):
            self.partition_users[index] = slice(start, start + len(partitions[index].keys))
            start += len(partitions[index].keys)
        self.keys = np.concatenate([np.empty((0, 16), np.uint8), *(table.keys for table in tables)])
        counts = [np.diff(table.user_offsets) for table in tables]
        self.row_users = np.repeat(np.arange(start), np.concatenate([np.empty(0, np.int64), *counts]).astype(np.int64))
        self.lengths = np.concatenate([np.empty(0, np.int64), *(np.diff(table.row_offsets) for table in tables)])
        self._tokens = np.concatenate([np.empty(0, np.int32), *(table.tokens for table in tables)])
        self._row_starts = np.cumsum(self.lengths) - self.lengths
        raw_labels = [label for table in tables for label in table.labels.tolist()]
        self.labels = labels.encode(raw_labels)
        self.times = np.concatenate([np.empty(0, "datetime64[us]"), *(table.timestamps for table in tables)])
        self._split = np.concatenate([np.empty(0, np.int8), *(table.split for table in tables)])
        self.erased = np.zeros(len(self.keys), bool)
        self._known_erased: set[bytes] = set()
        self.mark_erased(erased)

    def mark_erased(self, keys: Set[bytes]) -> None:
        """Users erased since: from now on none of their rows is in any split."""
        if new := keys - self._known_erased:
            self._known_erased |= new
            self.erased |= np.fromiter((key.tobytes() in new for key in self.keys), bool, count=len(self.keys))

    def of_split(self, split: SplitName, users: np.ndarray | None = None) -> np.ndarray:
        """Indices of the rows in a split, of all users or of `users` (ascending)."""
        return self._in_splits([split], users)

    def to_fit(self, users: np.ndarray | None) -> np.ndarray:
        """Indices of the rows to fit `users` (ascending; None: all) on once what all share stands: to train and, if wished, to validate.

        What is shared has learnt the training rows' labels, this user's among them; a validation row tells more of its user.
        """
        return self._in_splits(self._fit_splits, users)

    def _in_splits(self, splits: list[SplitName], users: np.ndarray | None) -> np.ndarray:
        codes = [SPLIT_CODES[split] for split in splits]
        if users is None:
            return np.flatnonzero(np.isin(self._split, codes) & ~self.erased[self.row_users])
        if not len(users):
            return np.empty(0, np.int64)
        low, high = np.searchsorted(self.row_users, [users[0], users[-1] + 1])
        chosen = np.isin(self._split[low:high], codes) & ~self.erased[self.row_users[low:high]]
        rows = low + np.flatnonzero(chosen)
        return rows[np.isin(self.row_users[rows], users)]

    def find(self, partition: int, keys: np.ndarray) -> np.ndarray:
        """Indices of the users of `partition` with these keys (uint8 [users, 16], ascending), without those erased.

        Raises StoreError if the partition doesn't hold one of them.
        """
        span = self.partition_users[partition]
        held, wanted = as_words(self.keys[span]), as_words(keys)
        places = np.searchsorted(held, wanted)
        if len(wanted) and (places[-1] >= len(held) or (held[places] != wanted).any()):
            raise StoreError(f"partition {partition} doesn't hold all users that were planned from it: run the job again")
        users = span.start + places
        return users[~self.erased[users]]

    def count_by_user(self, own: np.ndarray) -> np.ndarray:
        """[users], how many of the rows `own` are each user's."""
        return np.bincount(self.row_users[own], minlength=len(self.keys))

    @cached_property
    def texts(self) -> np.ndarray:
        """int32 [rows]: which of the rank's different texts each row is; rows of equal token ids are one text."""
        digests = np.empty((len(self.lengths), KEY_BYTES), np.uint8)
        for row, (start, length) in enumerate(zip(self._row_starts.tolist(), self.lengths.tolist(), strict=True)):
            digest = hashlib.blake2b(self._tokens[start : start + length].tobytes(), digest_size=KEY_BYTES)
            digests[row] = np.frombuffer(digest.digest(), np.uint8)
        return np.unique(as_words(digests), return_inverse=True)[1].astype(np.int32)

    def inputs(self, rows: np.ndarray, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """input_ids and attention_mask [batch, tokens], padded to the longest of `rows`."""
        if not len(rows):
            ids = torch.full((1, 8), self._pad_id, device=device)
            return ids, torch.ones_like(ids)
        ids, mask = pad_tokens(self._tokens, self._row_starts[rows], self.lengths[rows], self._pad_id)
        return ids.to(device), mask.to(device)

    def batch(self, rows: np.ndarray, device: torch.device | None = None) -> Batch:
        """A training batch; with no rows, one row of weight zero that only keeps ranks in step."""
        ids, mask = self.inputs(rows, device)
        if not len(rows):
            label = torch.zeros(1, dtype=self.labels.dtype, device=device)
            return Batch(ids, mask, torch.zeros(1, dtype=torch.int64), label, torch.zeros(1, device=device))
        users = torch.from_numpy(self.row_users[rows])
        return Batch(ids, mask, users, self.labels[rows].to(device), torch.ones(len(rows), device=device))


def first_users(candidates: np.ndarray, counts: np.ndarray, wanted: int) -> np.ndarray:
    """The first of `candidates`, in key order and so at random, that have so many rows together. counts: rows by user."""
    return candidates[: int(np.searchsorted(np.cumsum(counts[candidates]), wanted)) + 1]
