"""Who was served or fitted, by the day: what tells an adapter that nobody uses any more from one that waits for its user.

    used/since.json                    since when uses are written down, create-only
    used/{day}/{name}.safetensors      `keys` uint8 [users, 16], ascending: users of that day (UTC), as one process saw them

Every process adds objects of its own and replaces none, so nobody waits for anybody. Knows keys and days; doesn't know what a use is.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import uuid
from collections.abc import Iterable
from typing import Annotated, Final, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from plora_ray.errors import CorruptObjectError
from plora_ray.identity import KEY_BYTES, as_words
from plora_ray.store import names
from plora_ray.store.manifest import dump_json, load_json
from plora_ray.store.object_errors import ObjectExists
from plora_ray.store.objects import ObjectStore
from plora_ray.store.segments import ascending
from plora_ray.store.tensorfile import TensorSpec, encode, parse_header

FORMAT_VERSION: Final = "1"
READ_AT_ONCE = 32


class Since(BaseModel):
    """used/since.json. day: ISO 8601, the first whose uses are written down."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format_version: Literal["1"] = FORMAT_VERSION
    day: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]


def today() -> datetime.date:
    """The day in UTC."""
    return datetime.datetime.now(datetime.UTC).date()


def begin_uses(objects: ObjectStore) -> None:
    """From today on uses are written down, unless they were before."""
    with contextlib.suppress(ObjectExists):
        objects.create(names.USED_SINCE, dump_json(Since(day=today().isoformat())))


def uses_since(objects: ObjectStore) -> datetime.date | None:
    """The first day whose uses are written down; None before there is one."""
    data = objects.read_many([names.USED_SINCE]).get(names.USED_SINCE)
    return None if data is None else datetime.date.fromisoformat(load_json(Since, data, objects.uri_of(names.USED_SINCE)).day)


def write_uses(objects: ObjectStore, keys: Iterable[bytes], day: datetime.date) -> None:
    """Add these users to those of `day`, as one more object; none for nobody."""
    found = sorted(set(keys))
    if found:
        objects.create(names.used(day.isoformat(), uuid.uuid4().hex), encode_uses(np.frombuffer(b"".join(found), np.uint8)))


def read_uses(objects: ObjectStore, first: datetime.date) -> np.ndarray:
    """Keys uint8 [users, 16], ascending, of everybody who was used on `first` or later. Raises CorruptObjectError."""
    paths = [path for day, found in _by_day(objects).items() if day >= first.isoformat() for path in found]
    return _union(objects, paths)


def fold_uses(objects: ObjectStore, first: datetime.date) -> None:
    """Make one object of each day that is over, and delete the days before `first`. Stopped at any moment, it loses nothing."""
    over = today() - datetime.timedelta(days=1)  # a process may write yesterday's last uses a little after midnight
    for day, paths in _by_day(objects).items():
        if day < first.isoformat():
            for path in paths:
                objects.delete(path)
        elif day < over.isoformat() and len(paths) > 1:
            objects.create(names.used(day, uuid.uuid4().hex), encode_uses(_union(objects, paths)))
            for path in paths:
                objects.delete(path)


def encode_uses(keys: np.ndarray) -> bytes:
    """The object's bytes. keys: uint8, 16 a user, ascending and unique."""
    body = np.ascontiguousarray(keys, np.uint8).tobytes()
    spec = TensorSpec("keys", "U8", (len(body) // KEY_BYTES, KEY_BYTES))
    return encode([(spec, body)], {"format_version": FORMAT_VERSION, "checksum": _checksum(body)})


def decode_uses(data: bytes, name: str) -> np.ndarray:
    """Keys uint8 [users, 16], checksum verified. Raises CorruptObjectError naming `name`."""
    layout = parse_header(data, name)
    users = layout.tensors[0].shape[0] if layout.tensors and layout.tensors[0].shape else 0
    if layout.tensors != (TensorSpec("keys", "U8", (users, KEY_BYTES)),):
        raise CorruptObjectError(f"{name} doesn't hold the users of a day")
    body = data[layout.slice("keys")]
    keys = np.frombuffer(body, np.uint8).reshape(-1, KEY_BYTES)
    if layout.metadata != {"format_version": FORMAT_VERSION, "checksum": _checksum(body)} or not ascending(keys):
        raise CorruptObjectError(f"{name} doesn't hold the users of a day in format {FORMAT_VERSION}")
    return keys


def _by_day(objects: ObjectStore) -> dict[str, list[str]]:
    days: dict[str, list[str]] = {}
    for item in objects.list(names.USED):
        day = names.used_day(item.path)
        if day is not None:
            days.setdefault(day, []).append(item.path)
    return days


def _union(objects: ObjectStore, paths: list[str]) -> np.ndarray:
    found = np.empty((0, KEY_BYTES), np.uint8)
    for start in range(0, len(paths), READ_AT_ONCE):
        read = objects.read_many(paths[start : start + READ_AT_ONCE])
        some = np.concatenate([found, *(decode_uses(data, objects.uri_of(path)) for path, data in read.items())])
        some = some[np.lexsort(some[:, ::-1].T)]
        words = as_words(some)
        found = some[np.concatenate([[True], words[1:] != words[:-1]])] if len(some) else some
    return found


def _checksum(body: bytes) -> str:
    return hashlib.blake2b(body, digest_size=16).hexdigest()
