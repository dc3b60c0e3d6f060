"""The key ring: a few versioned wrapping keys in keys/ring.json, each wrapped by the root key.

    format_version, keys: a list of
        version       from 1, ascending; new data keys are wrapped by the last
        wrapped_hex   the 32-byte wrapping key under the root key, bound to the store and the version
        created_at    ISO 8601

It stands between root key and data keys so that a new root key rewrites this one object. Knows nothing of users.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field

from plora_ray.errors import CorruptObjectError, StoreError
from plora_ray.store import names
from plora_ray.store.adapters import now_iso
from plora_ray.store.encryption.root_key import RootKey, RootKeySource
from plora_ray.store.encryption.sealing import KEY_BYTES, SealBroken, new_key
from plora_ray.store.manifest import Strict, dump_json, load_json
from plora_ray.store.object_errors import ObjectExists, ObjectNotFound
from plora_ray.store.objects import ObjectStore

FORMAT_VERSION: Final = "1"


class RingKey(Strict):
    """One wrapping key, as it is stored."""

    version: Annotated[int, Field(ge=1, lt=2**32)]
    wrapped_hex: Annotated[str, Field(pattern=r"^([0-9a-f]{2})+$")]
    created_at: str


class KeyRing(Strict):
    """keys/ring.json."""

    format_version: Literal["1"] = FORMAT_VERSION
    keys: Annotated[list[RingKey], Field(min_length=1)]


class Ring:
    """The ring's keys in memory. newest: the version that wraps new data keys."""

    def __init__(self, keys: dict[int, bytes]) -> None:
        self._keys = keys
        self.newest = max(keys)

    def __contains__(self, version: int) -> bool:
        return version in self._keys

    def key(self, version: int) -> bytes:
        return self._keys[version]


def open_ring(objects: ObjectStore, store_id: str, source: RootKeySource) -> Ring:
    """The ring, unwrapped. Raises StoreError if it is missing or the root key is another one."""
    try:
        data = objects.read(names.KEY_RING)
    except ObjectNotFound as error:
        raise StoreError(f"{objects.uri_of(names.KEY_RING)} is gone, and without it no adapter can be read: restore it") from error
    return Ring(_unwrap(objects, data, store_id, source.open()))


def make_ring(objects: ObjectStore, store_id: str, source: RootKeySource) -> None:
    """Write a new store's ring unless there is one. Raises StoreError if there are data keys already: they would be lost."""
    if objects.exists(names.KEY_RING):
        return
    if objects.list(names.KEYS):
        raise StoreError(f"{objects.uri_of(names.KEY_RING)} is gone although there are data keys that need it: restore it")
    ring = KeyRing(keys=[_wrap(1, new_key(), store_id, source.open(), now_iso())])
    try:
        objects.create(names.KEY_RING, dump_json(ring))
    except ObjectExists:
        return  # somebody else made it a moment ago; theirs holds


def rotate_root(objects: ObjectStore, store_id: str, old: RootKeySource, new: RootKeySource) -> None:
    """Wrap the ring by another root key and add a wrapping key for new data keys. No adapter is touched.

    Raises StoreError, with nothing changed, if `old` isn't the ring's root key.
    """
    old_root, new_root, key, now = old.open(), new.open(), new_key(), now_iso()

    def rewrapped(data: bytes | None) -> bytes:
        if data is None:
            raise StoreError(f"{objects.uri_of(names.KEY_RING)} is gone, and without it no adapter can be read: restore it")
        keys = _unwrap(objects, data, store_id, old_root)
        created = {item.version: item.created_at for item in _parse(objects, data).keys}
        keys[max(keys) + 1] = key
        return dump_json(KeyRing(keys=[_wrap(number, keys[number], store_id, new_root, created.get(number, now)) for number in keys]))

    objects.update(names.KEY_RING, rewrapped)


def _parse(objects: ObjectStore, data: bytes) -> KeyRing:
    ring = load_json(KeyRing, data, objects.uri_of(names.KEY_RING))
    versions = [item.version for item in ring.keys]
    if versions != sorted(set(versions)):
        raise CorruptObjectError(f"{objects.uri_of(names.KEY_RING)} has versions that aren't ascending: restore it")
    return ring


def check_ring(objects: ObjectStore, data: bytes) -> None:
    """Raises CorruptObjectError unless the bytes are a ring; whose root key it is can't be told without that."""
    _parse(objects, data)


def _wrap(version: int, key: bytes, store_id: str, root: RootKey, created_at: str) -> RingKey:
    return RingKey(version=version, wrapped_hex=root.wrap(key, _bound_to(store_id, version)).hex(), created_at=created_at)


def _unwrap(objects: ObjectStore, data: bytes, store_id: str, root: RootKey) -> dict[int, bytes]:
    try:
        keys = {
            item.version: root.unwrap(bytes.fromhex(item.wrapped_hex), _bound_to(store_id, item.version))
            for item in _parse(objects, data).keys
        }
    except SealBroken as error:
        raise StoreError(f"{objects.uri} is encrypted under another root key: set store.encryption to the one it was last given") from error
    if any(len(key) != KEY_BYTES for key in keys.values()):
        raise CorruptObjectError(f"{objects.uri_of(names.KEY_RING)} holds keys of another length: restore it")
    return keys


def _bound_to(store_id: str, version: int) -> dict[str, str]:
    return {"plora-store": store_id, "plora-ring-version": str(version)}
