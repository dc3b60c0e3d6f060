"""Which rows go through the model together: batches bounded by padded tokens, of rows of like length.

Pure numpy and torch: knows lengths and tokens end to end, neither users nor labels. A model's cost is
rows x longest, so a batch of like lengths wastes little, and a bound on tokens keeps memory level where a bound on rows
would not.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from plora_ray.data.table import PartitionTable
from plora_ray.errors import DataError

BATCHES_PER_BUCKET = 50  # rows are sorted within about so many batches: long enough for little padding, short enough to mix


def token_budget_batches(
    lengths: NDArray[np.integer], max_tokens: int, max_rows: int, shuffle_seed: int | None, pad_to_multiple: int = 1
) -> list[NDArray[np.int64]]:
    """Divide rows 0..n-1 into batches of at most `max_rows` rows and `max_tokens` padded tokens.

    `lengths` [n] are the rows' tokens; a batch costs its rows x its longest row, rounded up to `pad_to_multiple`. Every
    row is in exactly one batch. With a seed, rows are mixed before they are bucketed by length and the batches come in
    mixed order, the same for the same seed; with None they come by falling length, so memory peaks in the first.
    Raises DataError if a single row is over the budget.
    """
    padded = _round_up(np.asarray(lengths, np.int64), pad_to_multiple)
    if padded.size == 0:
        return []
    longest, mean = int(padded.max()), float(padded.mean())
    if longest > max_tokens:
        raise DataError(f"a row of {longest} tokens is over the budget of {max_tokens} tokens a batch: raise it or lower max_length")
    if max_rows < 1:
        raise DataError(f"max_rows must be at least 1, got {max_rows}")
    rows = np.arange(padded.size)
    bucket_rows = padded.size
    rng = None if shuffle_seed is None else np.random.default_rng(shuffle_seed)
    if rng is not None:
        rng.shuffle(rows)
        bucket_rows = int(BATCHES_PER_BUCKET * max(1, min(max_rows, max_tokens / max(mean, 1))))
    batches = []
    for start in range(0, rows.size, bucket_rows):
        bucket = rows[start : start + bucket_rows]
        batches += _cut(bucket[np.argsort(-padded[bucket], kind="stable")], padded, max_tokens, max_rows)
    if rng is None:
        return batches
    return [batches[place] for place in rng.permutation(len(batches))]


def collate(table: PartitionTable, rows: NDArray[np.integer], pad_id: int, pad_to_multiple: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `input_ids` and `attention_mask`, both [rows, longest] int64, of rows of a partition; see `pad_tokens`."""
    return pad_tokens(table.tokens, table.row_offsets[rows], table.lengths[rows], pad_id, pad_to_multiple)


def pad_tokens(
    tokens: NDArray[np.int32], starts: NDArray[np.int64], lengths: NDArray[np.int64], pad_id: int, pad_to_multiple: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `input_ids` and `attention_mask`, both [rows, longest] int64, right-padded with `pad_id` to the longest row.

    Row i is `tokens[starts[i] : starts[i] + lengths[i]]`. `pad_to_multiple` rounds the longest up (8 suits tensor cores).
    There must be at least one row.
    """
    width = int(_round_up(lengths.max(), pad_to_multiple))
    places = np.arange(width)[None, :]  # [1, width]
    mask = places < lengths[:, None]  # [rows, width]
    # Padding reads some token that exists, and is then overwritten.
    ids = np.where(mask, tokens[np.minimum(starts[:, None] + places, tokens.size - 1)], pad_id)
    return torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(mask.astype(np.int64))


def _cut(rows: NDArray[np.int64], padded: NDArray[np.int64], max_tokens: int, max_rows: int) -> list[NDArray[np.int64]]:
    """Cut rows of falling length into batches: the first row of each is its longest."""
    batches, start = [], 0
    while start < rows.size:
        count = min(max_rows, max_tokens // max(int(padded[rows[start]]), 1))
        batches.append(rows[start : start + count])
        start += count
    return batches


def _round_up(lengths: NDArray[np.int64], multiple: int) -> NDArray[np.int64]:
    return -(-lengths // multiple) * multiple
