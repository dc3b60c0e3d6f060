"""One partition as the trainer sees it: users in key order, their rows, tokens end to end. And its parquet file.

A partition file holds keys and tokens, never a raw user id or a text. This file knows its columns and nothing of how rows
got there.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from numpy.typing import NDArray

from plora_ray.data.rows import SPLITS, SplitName, Task
from plora_ray.errors import DataError
from plora_ray.identity import KEY_BYTES
from plora_ray.store.object_errors import ObjectNotFound
from plora_ray.store.objects import SERVING_RETRY_S, ObjectStore

ROWS_PER_ROW_GROUP = 65_536


@dataclass(frozen=True)
class PartitionTable:
    """The rows of the users of one partition, sorted by user key; a user's rows keep the order of the source.

    keys          [users, 16] uint8, ascending and unique
    user_offsets  [users + 1] int64: user u owns rows user_offsets[u]:user_offsets[u + 1]
    tokens        [all tokens] int32
    row_offsets   [rows + 1] int64: row i owns tokens row_offsets[i]:row_offsets[i + 1]
    labels        [rows] class names (objects, str) or, for regression, float64
    split         [rows] int8: 0 train, 1 validation, 2 test
    timestamps    [rows] datetime64[us] in UTC, NaT where not given
    """

    keys: NDArray[np.uint8]
    user_offsets: NDArray[np.int64]
    tokens: NDArray[np.int32]
    row_offsets: NDArray[np.int64]
    labels: NDArray[np.object_] | NDArray[np.float64]
    split: NDArray[np.int8]
    timestamps: NDArray[np.datetime64]

    @property
    def users(self) -> int:
        return len(self.keys)

    @property
    def rows(self) -> int:
        return len(self.split)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row, [rows]."""
        return np.diff(self.row_offsets)

    @cached_property
    def user_of_row(self) -> NDArray[np.int64]:
        """Index into `keys` of each row's user, [rows]."""
        return np.repeat(np.arange(self.users), np.diff(self.user_offsets))

    def rows_of(self, users: slice, split: SplitName) -> NDArray[np.int64]:
        """Return the indices of the rows of a contiguous range of users that lie in `split`, ascending."""
        first, stop, step = users.indices(self.users)
        if step != 1:
            raise ValueError("users must be a slice without a step")
        low, high = self.user_offsets[first], self.user_offsets[max(first, stop)]
        rows: NDArray[np.int64] = low + np.flatnonzero(self.split[low:high] == SPLITS.index(split))
        return rows

    def of_users(self, chosen: NDArray[np.bool_]) -> PartitionTable:
        """The rows of the users that `chosen` [users] marks, and of no other."""
        rows = chosen[self.user_of_row]
        return PartitionTable(
            keys=self.keys[chosen],
            user_offsets=np.cumsum([0, *np.diff(self.user_offsets)[chosen]]),
            tokens=self.tokens[np.repeat(rows, self.lengths)],
            row_offsets=np.cumsum([0, *self.lengths[rows]]),
            labels=self.labels[rows],
            split=self.split[rows],
            timestamps=self.timestamps[rows],
        )


def partition_path(partition: int) -> str:
    """The name of one partition's file in its folder."""
    return f"partition-{partition:05d}.parquet"


def partition_schema(task: Task) -> pa.Schema:
    """The columns of a partition file."""
    return pa.schema(
        [
            pa.field("key", pa.binary(KEY_BYTES), nullable=False),
            pa.field("input_ids", pa.list_(pa.field("element", pa.int32(), nullable=False)), nullable=False),
            pa.field("label", pa.string() if task == "classification" else pa.float64(), nullable=False),
            pa.field("split", pa.int8(), nullable=False),
            pa.field("timestamp", pa.timestamp("us", tz="UTC")),
        ]
    )


def write_partition(objects: ObjectStore, partition: int, table: pa.Table) -> None:
    """Write a table of `partition_schema` sorted by key; readers see all of it or nothing."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=ROWS_PER_ROW_GROUP, compression="zstd")
    objects.write(partition_path(partition), buffer.getvalue())


def read_partition(
    destination: str, partition: int, storage_options: dict[str, Any] | None = None, *, retry_s: float = SERVING_RETRY_S
) -> PartitionTable:
    """Read one partition into memory, column by column. Raises DataError if it isn't there or isn't a partition."""
    objects, path = ObjectStore(destination, storage_options, retry_s=retry_s), partition_path(partition)
    try:
        table = pq.read_table(pa.BufferReader(objects.read(path)), use_threads=False)
    except (ObjectNotFound, pa.ArrowException) as error:
        raise DataError(f"{objects.uri_of(path)} can't be read ({type(error).__name__}): partition the data again") from error
    if table.schema.names != partition_schema("classification").names:
        raise DataError(f"{objects.uri_of(path)} isn't a partition file: its columns are {', '.join(table.schema.names)}")
    return as_partition(table)


def as_partition(table: pa.Table) -> PartitionTable:
    """The rows of a table of `partition_schema` sorted by key, as arrays."""
    keys = np.frombuffer(b"".join(_fixed_bytes(chunk) for chunk in table["key"].chunks), np.uint8).reshape(-1, KEY_BYTES)
    starts = np.flatnonzero(np.concatenate([[True], (keys[1:] != keys[:-1]).any(axis=1)])[: len(keys)])
    tokens, row_offsets = _ragged(table["input_ids"])
    timestamps = table["timestamp"].cast(pa.timestamp("us")).to_numpy(zero_copy_only=False).astype("datetime64[us]")
    return PartitionTable(
        keys=keys[starts],
        user_offsets=np.append(starts, len(keys)).astype(np.int64),
        tokens=tokens,
        row_offsets=row_offsets,
        labels=_labels(table["label"]),
        split=table["split"].to_numpy(),
        timestamps=timestamps,
    )


def _fixed_bytes(chunk: pa.Array) -> bytes:
    """The bytes of a fixed-width binary array without nulls."""
    data: bytes = chunk.buffers()[1][chunk.offset * KEY_BYTES : (chunk.offset + len(chunk)) * KEY_BYTES].to_pybytes()
    return data


def _ragged(column: pa.ChunkedArray) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The values of a list column end to end, and where each list begins; chunks are joined because offsets are 32-bit."""
    values = [chunk.flatten().to_numpy() for chunk in column.chunks]
    lengths = [np.diff(chunk.offsets.to_numpy()) for chunk in column.chunks]
    offsets = np.concatenate([np.zeros(1, np.int64), *lengths]).cumsum(dtype=np.int64)
    return np.concatenate([np.empty(0, np.int32), *values]), offsets


def _labels(column: pa.ChunkedArray) -> NDArray[np.object_] | NDArray[np.float64]:
    """Numbers as they are; names as references to one string a class, 8 bytes a row."""
    if pa.types.is_floating(column.type):
        numbers: NDArray[np.float64] = column.to_numpy()
        return numbers
    parts = [chunk.dictionary_encode() for chunk in column.chunks]
    names = [np.array(part.dictionary.to_pylist(), object)[part.indices.to_numpy()] for part in parts]
    return np.concatenate([np.empty(0, object), *names])
