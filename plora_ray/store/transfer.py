"""A generation in another store: for another region, a backup, or a cluster that only serves.

Users keep their keys, so the other store has the same key of the user hash. Erasures go first, so that nobody is served there who isn't
here; the manifest goes last, so that the generation exists there whole or not at all. Knows bytes, no model.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

from plora_ray.errors import CorruptObjectError, ErasedDuringFit, StoreError
from plora_ray.store import names
from plora_ray.store.adapter_store import AdapterStore
from plora_ray.store.adapters import FreshObject, decode_fresh, encode_fresh
from plora_ray.store.encryption.root_key import RootKeySource
from plora_ray.store.manifest import Beginning, Manifest, Tombstone, dump_json, load_json
from plora_ray.store.object_errors import ObjectExists
from plora_ray.store.objects import ObjectStore
from plora_ray.store.row_digests import decode_row_digests
from plora_ray.store.store_identity import make_like
from plora_ray.store.tombstones import write_tombstone
from plora_ray.store.wave_sealing import WaveSealing


def open_target(
    source: AdapterStore, uri: str, storage_options: dict[str, Any] | None = None, encryption: RootKeySource | None = None
) -> AdapterStore:
    """The store at `uri`, made if it is missing, that knows users by the same keys. Raises StoreError if it knows them by others.

    encryption: where its root key comes from. What is encrypted here isn't copied into a store that doesn't encrypt.
    """
    if source.encrypted and encryption is None:
        raise StoreError(f"{source.uri} is encrypted: give the root key that {uri} is to be encrypted under")
    encrypt, retry_s = encryption is not None, source.objects.retry_s
    identity = make_like(ObjectStore(uri, storage_options, retry_s=retry_s), source.objects, source.hash_secret, encrypt)
    secret = None if identity.key_hex else source.hash_secret
    target = AdapterStore(uri, storage_options, secret, retry_s=retry_s, encryption=encryption)
    if target.hash_secret != source.hash_secret:
        raise StoreError(f"{target.uri} knows users by another key than {source.uri}: copy into a new store")
    return target


def copy_generation(source: AdapterStore, generation: str, target: AdapterStore, on_objects: Callable[[int, int], None]) -> Manifest:
    """Copy a published generation with its fresh adapters and all erasures; every object is proven on the way. It doesn't serve yet.

    Into an encrypted store records go under data keys of that store; those of erased users stay behind.
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
    copied = standing or _copy_objects(source, manifest, target, on_objects)
    for found, data in _fresh(source, manifest):
        stored = _resealed(source, target, found) if target.encrypted else data
        if stored is not None:
            with contextlib.suppress(ObjectExists):  # what was stored there since is newer
                target.objects.create(names.fresh(found.key), stored)
    _copy_erasures(source, target)  # of users who left meanwhile
    if standing is None:
        path = names.manifest(generation)
        if load_json(Manifest, source.objects.read(path), source.objects.uri_of(path)) != manifest:
            raise CorruptObjectError(f"{source.objects.uri_of(path)} changed while it was copied: `plora store fsck` tells more")
        _create(target, path, dump_json(copied))
    return copied


def _copy_objects(source: AdapterStore, manifest: Manifest, target: AdapterStore, on_objects: Callable[[int, int], None]) -> Manifest:
    """All of the generation's objects but its manifest; returns that, as it is to stand in the target."""
    target.objects.probe()
    digests = {manifest.shared.path: manifest.shared.sha256, **{segment.path: segment.sha256 for segment in manifest.segments}}
    listed = {item.path: item.size for item in source.objects.list(f"{names.GENERATIONS}/{manifest.generation}")}
    others = [path for path in listed if path not in digests and path != names.manifest(manifest.generation)]
    waves = WaveSealing(source, manifest, target) if target.encrypted else None
    for place, path in enumerate([*digests, *others]):
        data = source.objects.read(path)
        if len(data) != listed.get(path) or (path in digests and hashlib.sha256(data).hexdigest() != digests[path]):
            raise CorruptObjectError(f"{source.objects.uri_of(path)} isn't what was published: `plora store fsck` tells more")
        _prove_beside(manifest.generation, path, data, source.objects.uri_of(path))
        if waves is not None and names.wave_of(path) is not None:
            waves.write(path, data)
        else:
            _create(target, path, data)
        on_objects(place + 1, len(digests) + len(others))
    return manifest if waves is None else waves.manifest()


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


def _fresh(source: AdapterStore, manifest: Manifest) -> Iterator[tuple[FreshObject, bytes]]:
    """The fresh objects that serve with the generation, and their bytes."""
    for item in source.objects.list(names.FRESH):
        if names.fresh_key(item.path) is None:
            continue
        data = source.objects.read_many([item.path]).get(item.path)
        found = None if data is None else decode_fresh(data, source.objects.uri_of(item.path))
        if data is not None and found is not None and found.adapter is not None and found.adapter.basis == manifest.shared.sha256:
            yield found, data


def _resealed(source: AdapterStore, target: AdapterStore, found: FreshObject) -> bytes | None:
    """The fresh object under a data key of the target; None if its user has been erased since."""
    adapter = None if found.adapter is None else source.fresh.opened(found.adapter)
    if adapter is None:
        return None
    try:
        return encode_fresh(target.fresh.sealed(adapter), found.erased_version)
    except ErasedDuringFit:
        return None
