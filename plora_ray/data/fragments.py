"""The shuffle's intermediate files: validated rows on their way from the units they came in to the partition they belong to.

A fragment is an object of some megabytes with one Arrow stream a partition, end to end, so a partition's rows are read by
one ranged read a fragment, and there are as many objects as there is data rather than units x partitions. Fragments hold
texts (no user ids) and live only as long as the partitioning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from numpy.typing import NDArray

from plora_ray.data.rows import SPLITS, Row, SplitName, Task
from plora_ray.errors import DataError
from plora_ray.identity import KEY_BYTES
from plora_ray.store.objects import ObjectRange, ObjectStore

FRAGMENT_CHARS = 16 * 2**20  # of text held by a task before it is written out
ROW_OVERHEAD_CHARS = 200  # what the other columns of a row weigh as Python objects


@dataclass(frozen=True, slots=True)
class Fragment:
    """The object at `path`: the rows of partition p are its bytes offsets[p] to offsets[p + 1]. offsets: [partitions + 1] int64."""

    path: str
    offsets: NDArray[np.int64]

    def piece(self, partition: int) -> ObjectRange | None:
        """Where a partition's rows are; None if there are none."""
        start, stop = (int(offset) for offset in self.offsets[partition : partition + 2])
        return ObjectRange(self.path, start, stop) if stop > start else None


class FragmentWriter:
    """Collects a unit's rows and writes them out, by partition, whenever they fill a fragment."""

    def __init__(self, objects: ObjectStore, folder: str, unit: int, task: Task, partitions: int) -> None:
        self.fragments: list[Fragment] = []
        self._objects, self._folder, self._unit, self._count = objects, folder, unit, partitions
        self._schema = _schema(task)
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
        bounds = np.searchsorted(partitions[order], np.arange(self._count + 1))
        streams = [_encode(table.take(order[low:high])) if high > low else b"" for low, high in zip(bounds, bounds[1:], strict=False)]
        path = f"{self._folder}/unit-{self._unit:06d}-{len(self.fragments):05d}.arrows"
        self._objects.write(path, b"".join(streams))
        self.fragments.append(Fragment(path, np.cumsum([0, *map(len, streams)], dtype=np.int64)))
        self._clear()

    def _clear(self) -> None:
        self._partitions: list[int] = []
        self._columns: dict[str, list[Any]] = {name: [] for name in self._schema.names if name != "unit"}
        self._chars = 0


def read_pieces(objects: ObjectStore, pieces: list[ObjectRange], task: Task) -> pa.Table:
    """Return a partition's rows sorted by user key, then by their place in the source. Raises DataError if a fragment is gone."""
    tables = [_schema(task).empty_table()]
    for piece, data in zip(pieces, objects.read_ranges(pieces), strict=True):
        if data is None:
            raise DataError(f"{objects.uri_of(piece.path)} is gone: another job partitions into the same folder; run the job again")
        tables.append(pa.ipc.open_stream(data).read_all())
    table = pa.concat_tables(tables)
    halves = _key_halves(table["key"])
    order = np.lexsort((table["number"].to_numpy(), table["unit"].to_numpy(), halves[:, 1], halves[:, 0]))
    return table.take(order)


def _encode(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return data


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
