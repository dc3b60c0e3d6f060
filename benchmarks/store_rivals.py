"""What else could hold a million users' vectors: an object a user through s3fs, and a Lance dataset with an index on the user."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import fsspec
import numpy as np
import pyarrow as pa
from safetensors.numpy import load, save

Waves = Iterator[tuple[np.ndarray, np.ndarray]]  # keys uint8 [users, 16] ascending, records float32 [users, width]


class Rival(Protocol):
    """A store of one generation. Keys are 16 bytes; records come back as float32 [width]."""

    def publish(self, waves: Waves) -> None: ...
    def open(self) -> None: ...
    def pull(self, key: bytes) -> np.ndarray: ...
    def pull_many(self, keys: list[bytes]) -> int: ...
    def objects(self) -> int: ...


class ObjectPerUser:
    """safetensors objects named by the key, written and read through fsspec, many at once where there are many."""

    def __init__(self, uri: str, storage_options: dict[str, Any]) -> None:
        self._protocol, self._root = uri.split("://")
        self._options = storage_options

    def publish(self, waves: Waves) -> None:
        self.open()
        self._fs.makedirs(self._root, exist_ok=True)
        for keys, records in waves:
            objects = {self._path(key.tobytes()): save({"record": record}) for key, record in zip(keys, records, strict=True)}
            if self._protocol == "s3":
                self._fs.pipe(objects)
            else:
                for path, data in objects.items():
                    self._fs.pipe_file(path, data)

    def open(self) -> None:
        self._fs = fsspec.filesystem(self._protocol, **self._options, use_listings_cache=False, skip_instance_cache=True)

    def pull(self, key: bytes) -> np.ndarray:
        return load(self._fs.cat_file(self._path(key)))["record"]

    def pull_many(self, keys: list[bytes]) -> int:
        return len([load(data) for data in self._fs.cat([self._path(key) for key in keys]).values()])

    def objects(self) -> int:
        return len(self._fs.find(self._root))

    def _path(self, key: bytes) -> str:
        return f"{self._root}/{key.hex()}.safetensors"


class LanceDataset:
    """A Lance table of hex keys and fixed-size lists, with a B-tree on the key."""

    def __init__(self, uri: str, storage_options: dict[str, Any]) -> None:
        self._uri = uri.removeprefix("file://")
        self._options = {
            "access_key_id": storage_options["key"], "secret_access_key": storage_options["secret"],
            "endpoint": storage_options["endpoint_url"], "region": "us-east-1", "allow_http": "true",
        } if storage_options else None  # fmt: skip

    def publish(self, waves: Waves) -> None:
        import lance

        keys, records = next(waves)
        batches = (self._batch(*wave) for wave in _with_first((keys, records), waves))
        dataset = lance.write_dataset(batches, self._uri, schema=self._batch(keys[:1], records[:1]).schema, storage_options=self._options)
        dataset.create_scalar_index("key", "BTREE")

    def open(self) -> None:
        import lance

        self._dataset = lance.dataset(self._uri, storage_options=self._options)

    def pull(self, key: bytes) -> np.ndarray:
        found = self._dataset.to_table(columns=["record"], filter=f"key = '{key.hex()}'")
        record: np.ndarray = found["record"].combine_chunks().flatten().to_numpy()
        return record

    def pull_many(self, keys: list[bytes]) -> int:
        listed = ", ".join(f"'{key.hex()}'" for key in keys)
        return int(self._dataset.to_table(columns=["key", "record"], filter=f"key IN ({listed})").num_rows)

    def objects(self) -> int:
        return sum(path.is_file() for path in Path(self._uri).rglob("*")) if self._options is None else 0

    @staticmethod
    def _batch(keys: np.ndarray, records: np.ndarray) -> pa.RecordBatch:
        names = pa.array([key.tobytes().hex() for key in keys])
        return pa.record_batch({"key": names, "record": pa.FixedSizeListArray.from_arrays(pa.array(records.ravel()), records.shape[1])})


def _with_first(first: tuple[np.ndarray, np.ndarray], rest: Waves) -> Waves:
    yield first
    yield from rest
