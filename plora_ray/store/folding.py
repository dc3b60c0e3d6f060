"""Fresh adapters that go into a new generation of the same shared weights, and those that come too late for it.

A generation takes over the fresh adapters that stand when its job is planned. One that is stored while the job runs has a
later version than the generation and serves by itself, unless the clock of the machine that stored it is behind: then its
version is raised. Knows bytes and versions, no model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from plora_ray.errors import CorruptObjectError
from plora_ray.store import names
from plora_ray.store.adapter_store import AdapterStore
from plora_ray.store.adapters import UserAdapter, decode_fresh, encode_fresh, version_above
from plora_ray.store.objects import ObjectInfo, ObjectStore
from plora_ray.store.tombstones import tombstone_version

READ_AT_ONCE = 256  # fresh objects; a few hundred bytes each


@dataclass(frozen=True)
class FreshSnapshot:
    """The fresh objects that stood at one moment. keys: of their users, ascending. seen: uint64 [objects] ascending, one a state."""

    keys: list[bytes]
    seen: np.ndarray

    @classmethod
    def take(cls, objects: ObjectStore) -> FreshSnapshot:
        """List the fresh objects; reads none."""
        listed = [(key, item) for item in objects.list(names.FRESH) if (key := names.fresh_key(item.path)) is not None]
        return cls([key for key, _ in listed], np.sort(np.array([_state(item) for _, item in listed], np.uint64)))


def fresh_adapters(store: AdapterStore, keys: list[bytes], basis: str) -> Iterator[UserAdapter]:
    """The adapters of `keys` that fit the shared weights `basis`, in the order of the keys.

    Raises CorruptObjectError for a damaged object: a generation made without it would end what it may still hold.
    """
    for start in range(0, len(keys), READ_AT_ONCE):
        found = store.objects.read_many(names.fresh(key) for key in keys[start : start + READ_AT_ONCE])
        standing = (_adapter(store.objects, key, found.get(names.fresh(key)), basis) for key in keys[start : start + READ_AT_ONCE])
        yield from store.fresh.opened_many([adapter for adapter in standing if adapter is not None])


def raise_late_versions(objects: ObjectStore, seen: np.ndarray, basis: str, version: str) -> int:
    """Raise just above `version` the fresh adapters of `basis` that were stored since `seen` with older ones; returns how many.

    A user whose erasure has begun stays erased: an adapter that a tombstone covers isn't raised, and a tombstone that is written
    later covers the raised one, too. Raises CorruptObjectError for a damaged object.
    """
    raised = 0

    def newer(key: bytes, data: bytes | None) -> bytes | None:
        adapter = _adapter(objects, key, data, basis)
        if data is None or adapter is None or adapter.version > version:
            return None
        erased = tombstone_version(objects, adapter.key)
        if erased is not None and erased >= adapter.version:
            return None
        return encode_fresh(replace(adapter, version=version_above(version)), decode_fresh(data, "").erased_version)

    for item in objects.list(names.FRESH):
        key = names.fresh_key(item.path)
        if key is None or _contains(seen, _state(item)):
            continue
        before = objects.read_many([item.path]).get(item.path)
        raised += objects.update(item.path, partial(newer, key)) != before
    return raised


def _adapter(objects: ObjectStore, key: bytes, data: bytes | None, basis: str) -> UserAdapter | None:
    if data is None:
        return None
    name = objects.uri_of(names.fresh(key))
    found = decode_fresh(data, name)
    if found.key != key:
        raise CorruptObjectError(f"{name} holds another user's adapter: delete it")
    return found.adapter if found.adapter is not None and found.adapter.basis == basis else None


def _state(item: ObjectInfo) -> int:
    """A number that changes when the object does."""
    return int.from_bytes(hashlib.blake2b(f"{item.path} {item.tag}".encode(), digest_size=8).digest(), "big")


def _contains(ascending: np.ndarray, value: int) -> bool:
    place = int(np.searchsorted(ascending, np.uint64(value)))
    return place < len(ascending) and int(ascending[place]) == value
