"""The shuffle's intermediate files: validated rows on their way from the units they came in to the partition they belong to.

A fragment is an Arrow file of some tens of megabytes with one record batch a partition, so a partition's rows are read by
one ranged read a fragment, and there are as many files as there is data rather than units x partitions. Fragments hold
texts (no user ids) and live only as long as the partitioning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import fsspec  # type: ignore[import-untyped]
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from numpy.typing import NDArray

from plora_ray.data.rows import SPLITS, Row, SplitName, Task
from plora_ray.data.table import put_object
from plora_ray.identity import KEY_BYTES

FRAGMENT_CHARS = 16 * 2**20  # of text held by a task before it is written out
ROW_OVERHEAD_CHARS = 200  # what the other columns of a row weigh as Python objects


@dataclass(frozen=True, slots=True)
class Piece:
    """The rows of one partition in one fragment."""

    partition: int
    path: str
    batch: int


class FragmentWriter:
    """Collects a unit's rows and writes them out, by partition, whenever they fill a fragment."""

    def __init__(self, folder: str, unit: int, task: Task, storage_options: dict[str, Any]) -> None:
        self.pieces: list[Piece] = []
        self._folder, self._unit, self._storage_options = folder, unit, storage_options
        self._schema = _schema(task)
        self._fragments = 0
        self._clear()

    def add(self, partition: int, key: bytes, number: int, row: Row, split: SplitName) -> None:
        """Take a row; `number` is its place in the unit."""
        self._partitions.append(partition)
        columns = self._columns
        columns["key"].append(key)
        columns["number"].append(number)
        columns["text"].append(row.text)
        columns["label"].append(row.label)
        columns["split"].append(SPLITS.index(split))
        columns["timestamp"].append(row.timestamp)
        self._chars += len(row.text) + ROW_OVERHEAD_CHARS
        if self._chars >= FRAGMENT_CHARS:
            self.flush()

    def flush(self) -> None:
        """Write what was collected as one fragment."""
        if not self._partitions:
            return
        columns = {name: pa.array(values, self._schema.field(name).type) for name, values in self._columns.items()}
        columns["unit"] = pa.array(np.full(len(self._partitions), self._unit, np.int64))
        table = pa.table([columns[name] for name in self._schema.names], schema=self._schema)
        partitions = np.array(self._partitions)
        order = np.argsort(partitions, kind="stable")
        present, starts = np.unique(partitions[order], return_index=True)
        path = f"{self._folder}/unit-{self._unit:06d}-{self._fragments:05d}.arrow"
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, self._schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
            for batch, rows in enumerate(np.split(order, starts[1:])):
                writer.write_batch(table.take(rows).combine_chunks().to_batches()[0])
                self.pieces.append(Piece(int(present[batch]), path, batch))
        put_object(path, sink.getvalue().to_pybytes(), self._storage_options)
        self._fragments += 1
        self._clear()

    def _clear(self) -> None:
        self._partitions: list[int] = []
        self._columns: dict[str, list[Any]] = {name: [] for name in self._schema.names if name != "unit"}
        self._chars = 0


def read_pieces(pieces: list[Piece], task: Task, storage_options: dict[str, Any]) -> pa.Table:
    """Return a partition's rows sorted by user key, then by their place in the source."""
    batches = []
    for piece in pieces:
        fs, path = fsspec.core.url_to_fs(piece.path, **storage_options)
        with fs.open(path, "rb") as stream, pa.ipc.open_file(stream) as reader:
            batches.append(reader.get_batch(piece.batch))
    table = pa.Table.from_batches(batches, schema=_schema(task))
    halves = _key_halves(table["key"])
    order = np.lexsort((table["number"].to_numpy(), table["unit"].to_numpy(), halves[:, 1], halves[:, 0]))
    return table.take(order)


def _schema(task: Task) -> pa.Schema:
    return pa.schema(
        [
            ("key", pa.binary(KEY_BYTES)),
            ("unit", pa.int64()),
            ("number", pa.int64()),
            ("text", pa.large_string()),  # 64-bit offsets: a partition's texts may exceed 2 GiB
            ("label", pa.string() if task == "classification" else pa.float64()),
            ("split", pa.int8()),
            ("timestamp", pa.timestamp("us", tz="UTC")),
        ]
    )


def _key_halves(keys: pa.ChunkedArray) -> NDArray[np.uint64]:
    """Keys as [rows, 2] big-endian numbers, which sort as the bytes do."""
    return np.frombuffer(b"".join(keys.to_pylist()), ">u8").reshape(-1, 2)
