"""Who was erased, and when: the erased/ folder as a dictionary that can be brought up to date cheaply.

A record of a segment is never served to an erased user's key again; an adapter fitted after the erasure is.
"""

from __future__ import annotations

import threading

from plora_ray.store import names
from plora_ray.store.manifest import Tombstone, dump_json, load_json
from plora_ray.store.object_errors import ObjectNotFound
from plora_ray.store.objects import ObjectStore


def tombstone_version(objects: ObjectStore, key: bytes) -> str | None:
    """The version of the user's last erasure as it stands in the store now; None if the user was never erased."""
    path = names.tombstone(key)
    try:
        return load_json(Tombstone, objects.read(path), objects.uri_of(path)).version
    except ObjectNotFound:
        return None


def write_tombstone(objects: ObjectStore, key: bytes, tombstone: Tombstone) -> None:
    """Write the user's tombstone unless a later one stands there."""
    path = names.tombstone(key)

    def newest(data: bytes | None) -> bytes | None:
        if data is not None and load_json(Tombstone, data, objects.uri_of(path)).version >= tombstone.version:
            return None
        return dump_json(tombstone)

    objects.update(path, newest)


class Tombstones:
    """The tombstones as of the last `refresh`. Reads are safe while another thread refreshes."""

    def __init__(self, objects: ObjectStore) -> None:
        self._objects = objects
        self._tags: dict[str, str] = {}
        self._versions: dict[bytes, str] = {}
        self._refreshing = threading.Lock()  # an older listing mustn't replace a newer one

    def __reduce__(self) -> tuple[type[Tombstones], tuple[ObjectStore]]:
        return Tombstones, (self._objects,)

    def refresh(self) -> None:
        """List the folder and read the tombstones that are new or replaced. Raises StoreError."""
        with self._refreshing:
            self._refresh()

    def _refresh(self) -> None:
        listed = {item.path: item.tag for item in self._objects.list(names.ERASED) if names.erased_key(item.path) is not None}
        changed = [path for path, tag in listed.items() if self._tags.get(path) != tag]
        versions = dict(self._versions)
        for path, data in self._objects.read_many(changed).items():
            key = names.erased_key(path)
            if key is not None:
                versions[key] = load_json(Tombstone, data, self._objects.uri_of(path)).version
        self._tags, self._versions = listed, versions  # whole dictionaries are swapped: readers need no lock

    def version(self, key: bytes) -> str | None:
        """The version of the user's last erasure: adapters up to it are dead. None if the user was never erased."""
        return self._versions.get(key)

    def __contains__(self, key: bytes) -> bool:
        return key in self._versions

    def as_dict(self) -> dict[bytes, str]:
        """Key to version of the last erasure."""
        return dict(self._versions)
