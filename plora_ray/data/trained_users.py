"""Who has training rows in a partition, how many, and a keyed digest that tells whether they are still the same rows.

Small beside the partition itself (36 bytes a user), so a job is planned without reading a row. The digest is keyed with the
store's secret: it can be kept for the next job, and says nothing to whoever reads the bucket.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from plora_ray.data.rows import SPLITS
from plora_ray.data.table import PartitionTable
from plora_ray.errors import DataError
from plora_ray.store.object_errors import ObjectNotFound
from plora_ray.store.objects import SERVING_RETRY_S, ObjectStore

DIGEST_BYTES = 16


@dataclass(frozen=True)
class TrainedUsers:
    """keys, digests: uint8 [users, 16], keys ascending. rows: int32 [users] training rows, at least one."""

    keys: NDArray[np.uint8]
    digests: NDArray[np.uint8]
    rows: NDArray[np.int32]


def trained_users(table: PartitionTable, secret: bytes) -> TrainedUsers:
    """The users of a partition that have training rows.

    A user's digest covers token ids and labels of the rows to train and to validate, in any order: both shape an adapter.
    Dates do, too, where rows are forgotten, and aren't covered: a source that gets them later doesn't make everybody new.
    """
    users, counts = np.unique(table.user_of_row[table.split == SPLITS.index("train")], return_counts=True)
    learnt = np.flatnonzero(table.split != SPLITS.index("test"))
    starts, stops = (np.searchsorted(table.user_of_row[learnt], users, side) for side in ("left", "right"))
    digests = np.empty((len(users), DIGEST_BYTES), np.uint8)
    for place, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        rows = sorted(_row_digest(table, row) for row in learnt[start:stop])
        digest = hashlib.blake2b(b"".join(rows), key=secret, digest_size=DIGEST_BYTES, person=b"plora-rows")
        digests[place] = np.frombuffer(digest.digest(), np.uint8)
    return TrainedUsers(table.keys[users], digests, counts.astype(np.int32))


def write_trained_users(objects: ObjectStore, partition: int, users: TrainedUsers) -> None:
    """Write the file beside the partition's own."""
    objects.write(_path(partition), save({name: np.ascontiguousarray(values) for name, values in vars(users).items()}))


def read_trained_users(
    destination: str, partition: int, storage_options: dict[str, Any] | None = None, *, retry_s: float = SERVING_RETRY_S
) -> TrainedUsers:
    """Read the file of one partition. Raises DataError if it isn't there or isn't one."""
    objects, path = ObjectStore(destination, storage_options, retry_s=retry_s), _path(partition)
    try:
        return TrainedUsers(**load(objects.read(path)))
    except (ObjectNotFound, SafetensorError, TypeError) as error:
        raise DataError(f"{objects.uri_of(path)} can't be read ({type(error).__name__}): partition the data again") from error


def _row_digest(table: PartitionTable, row: int) -> bytes:
    tokens = table.tokens[table.row_offsets[row] : table.row_offsets[row + 1]]
    digest = hashlib.blake2b(tokens.astype("<i4").tobytes(), digest_size=DIGEST_BYTES)
    digest.update(str(table.labels[row]).encode())
    return digest.digest()


def _path(partition: int) -> str:
    return f"partition-{partition:05d}.users.safetensors"
