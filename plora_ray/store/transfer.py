"""A generation in another store: for another region, a backup, or a cluster that only serves.

Users keep their keys, so the other store has the same key of the user hash. Erasures go first, so that nobody is served there who isn't
here; the manifest goes last, so that the generation exists there whole or not at all. Knows bytes, no model.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

from plora_ray.errors import CorruptObjectError, StoreError
from plora_ray.store import names
from plora_ray.store.adapter_store import AdapterStore
from plora_ray.store.adapters import decode_fresh
from plora_ray.store.manifest import Beginning, Manifest, Tombstone, load_json
from plora_ray.store.object_errors import ObjectExists
from plora_ray.store.objects import ObjectStore
from plora_ray.store.row_digests import decode_row_digests
from plora_ray.store.store_identity import make_like
from plora_ray.store.tombstones import write_tombstone


def open_target(source: AdapterStore, uri: str, storage_options: dict[str, Any] | None = None) -> AdapterStore:
    """The store at `uri`, made if it is missing, that knows users by the same keys. Raises StoreError if it knows them by others."""
    identity = make_like(ObjectStore(uri, storage_options, retry_s=source.objects.retry_s), source.objects, source.hash_secret)
    target = AdapterStore(uri, storage_options, None if identity.key_hex else source.hash_secret, retry_s=source.objects.retry_s)
    if target.hash_secret != source.hash_secret:
        raise StoreError(f"{target.uri} knows users by another key than {source.uri}: copy into a new store")
    return target


def copy_generation(source: AdapterStore, generation: str, target: AdapterStore, on_objects: Callable[[int, int], None]) -> Manifest:
    """Copy a published generation with its fresh adapters and all erasures; every object is proven on the way. It doesn't serve yet.

    Stopped and called again it goes on. on_objects: hears how many of how many are copied.
    Raises StoreError, CorruptObjectError with nothing published in the target.
    """
    manifest = source.manifest(generation)
    if manifest is None:
        raise StoreError(f"{source.uri} has no generation {generation}: `plora generations list` names them")
    standing = target.manifest(generation)
    if standing is not None and standing.commit_id != manifest.commit_id:
        raise StoreError(f"{target.uri} has another generation {generation}: copy into a new store")
    _copy_erasures(source, target)
    if standing is None:
        _copy_objects(source, manifest, target, on_objects)
    for path, data in _fresh(source, manifest):
        with contextlib.suppress(ObjectExists):  # what was stored there since is newer
            target.objects.create(path, data)
    _copy_erasures(source, target)  # of users who left meanwhile
    if standing is None:
        path = names.manifest(generation)
        data = source.objects.read(path)
        if load_json(Manifest, data, source.objects.uri_of(path)) != manifest:
            raise CorruptObjectError(f"{source.objects.uri_of(path)} changed while it was copied: `plora store fsck` tells more")
        _create(target, path, data)
    return manifest


def _copy_objects(source: AdapterStore, manifest: Manifest, target: AdapterStore, on_objects: Callable[[int, int], None]) -> None:
    """All of the generation's objects but its manifest."""
    target.objects.probe()
    digests = {manifest.shared.path: manifest.shared.sha256, **{segment.path: segment.sha256 for segment in manifest.segments}}
    listed = {item.path: item.size for item in source.objects.list(f"{names.GENERATIONS}/{manifest.generation}")}
    others = [path for path in listed if path not in digests and path != names.manifest(manifest.generation)]
    for place, path in enumerate([*digests, *others]):
        data = source.objects.read(path)
        if len(data) != listed.get(path) or (path in digests and hashlib.sha256(data).hexdigest() != digests[path]):
            raise CorruptObjectError(f"{source.objects.uri_of(path)} isn't what was published: `plora store fsck` tells more")
        _prove_beside(manifest.generation, path, data, source.objects.uri_of(path))
        _create(target, path, data)
        on_objects(place + 1, len(digests) + len(others))


def _prove_beside(generation: str, path: str, data: bytes, name: str) -> None:
    """Raises CorruptObjectError for a damaged object that no manifest names and that has a checksum of its own; reports have none."""
    if path == names.beginning(generation):
        load_json(Beginning, data, name)
    elif path.startswith(f"{names.row_digests(generation)}/"):
        decode_row_digests(data, name)


def _copy_erasures(source: AdapterStore, target: AdapterStore) -> None:
    known = target.tombstones()
    for key, version in source.tombstones().items():
        if known.get(key, "") >= version:
            continue
        data = source.objects.read(names.tombstone(key))
        name = source.objects.uri_of(names.tombstone(key))
        write_tombstone(target.objects, key, load_json(Tombstone, data, name))


def _create(target: AdapterStore, path: str, data: bytes) -> None:
    """Write the object unless it stands there already; a damaged one is replaced."""
    try:
        target.objects.create(path, data)
    except ObjectExists:
        if target.objects.read(path) != data:
            target.objects.write(path, data)


def _fresh(source: AdapterStore, manifest: Manifest) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of the fresh objects that serve with the generation."""
    for item in source.objects.list(names.FRESH):
        if names.fresh_key(item.path) is None:
            continue
        data = source.objects.read_many([item.path]).get(item.path)
        adapter = None if data is None else decode_fresh(data, source.objects.uri_of(item.path)).adapter
        if data is not None and adapter is not None and adapter.basis == manifest.shared.sha256:
            yield item.path, data
