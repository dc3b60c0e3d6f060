"""Checking a whole store: every digest, every count, every name. Changes nothing.

Reads each object once, a segment at a time. Knows what a sound store looks like; knows no model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from pydantic import BaseModel

from plora_ray.errors import CorruptObjectError, StoreError
from plora_ray.store import names
from plora_ray.store.adapter_store import AdapterStore
from plora_ray.store.adapters import decode_fresh
from plora_ray.store.canary import Canary
from plora_ray.store.decryption_check import DecryptionCheck
from plora_ray.store.encryption.ring import check_ring
from plora_ray.store.encryption.sealing import Place
from plora_ray.store.manifest import Beginning, Current, Manifest, SegmentRef, StoreIdentity, Tombstone, load_json
from plora_ray.store.objects import PROBE, ObjectInfo
from plora_ray.store.retained import decode_examples
from plora_ray.store.row_digests import decode_row_digests
from plora_ray.store.segments import decode_segment
from plora_ray.store.shared import decode_shared
from plora_ray.store.uses import Since, decode_uses


@dataclass(frozen=True)
class Problem:
    """path: of the object. what: what is wrong with it and what to do, in one line."""

    path: str
    what: str


@dataclass
class Checked:
    """objects, size: read, sound or not, and their bytes. unfinished: generations without a manifest. unknown: names of nobody's.

    data_keys: users who have one, in an encrypted store.
    """

    objects: int = 0
    size: int = 0
    generations: int = 0
    users: int = 0
    fresh: int = 0
    erased: int = 0
    data_keys: int = 0
    unfinished: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def check(store: AdapterStore, on_objects: Callable[[int, int], None]) -> Checked:
    """Check every object of the store. on_objects: hears how many of how many are checked. Raises StoreError if one can't be read.

    Jobs and servers may go on meanwhile: what they add after the start is not looked at, what they delete is no problem.
    """
    listed = {item.path: item for item in store.objects.list() if not item.path.startswith(("runs/", f"{PROBE}/"))}
    return _Check(store, listed, on_objects).run()


class _Check:
    def __init__(self, store: AdapterStore, listed: dict[str, ObjectInfo], on_objects: Callable[[int, int], None]) -> None:
        self._store, self._objects, self._listed, self._on_objects = store, store.objects, listed, on_objects
        self._found = Checked()
        self._left = dict(listed)
        self._decryption = DecryptionCheck(store)

    def run(self) -> Checked:
        """Whole generations first, by their manifests; then what stands beside them; the names that are left belong to nobody."""
        self._keys()
        manifests: dict[str, Manifest | None] = {}
        for path in [path for path in self._listed if path.endswith(f"/{names.MANIFEST}")]:
            manifests[path.split("/")[1]] = self._generation(path)
        self._current(manifests)
        self._object(names.IDENTITY, partial(self._json, StoreIdentity))
        if names.CANARY in self._left:
            self._object(names.CANARY, partial(self._json, Canary))
        for path in list(self._left):
            if names.fresh_key(path) is not None:
                self._found.fresh += 1
                self._object(path, self._fresh)
            elif names.erased_key(path) is not None:
                self._found.erased += 1
                self._object(path, partial(self._json, Tombstone))
            elif names.examples_key(path) is not None:
                self._object(path, self._examples)
            elif names.used_day(path) is not None:
                self._object(path, self._uses)
            elif path == names.USED_SINCE:
                self._object(path, partial(self._json, Since))
            elif names.generation_of(path) is not None:
                self._beside(path, manifests)
        self._found.unknown = sorted(self._left)
        return self._found

    def _keys(self) -> None:
        """The ring and all shards, before the records that need them."""
        if not self._store.encrypted:
            return
        self._object(names.KEY_RING, lambda path, data: check_ring(self._objects, data))
        for path in [path for path in self._listed if names.key_shard_byte(path) is not None]:
            self._object(path, self._decryption.learn)
        self._found.data_keys = self._decryption.users

    def _generation(self, path: str) -> Manifest | None:
        manifest: Manifest | None = None

        def read(path: str, data: bytes) -> None:
            nonlocal manifest
            manifest = load_json(Manifest, data, path)
            if names.manifest(manifest.generation) != path:
                raise CorruptObjectError(f"is the manifest of generation {manifest.generation}")
            if (manifest.encryption is not None) != self._store.encrypted:
                raise CorruptObjectError("and its store don't agree on whether adapters are encrypted: restore it")

        self._object(path, read)
        if manifest is None:
            return None
        self._found.generations += 1
        self._found.users += manifest.users
        self._object(manifest.shared.path, partial(self._shared, manifest.shared.sha256))
        for segment in manifest.segments:
            self._object(segment.path, partial(self._segment, manifest, segment))
        return manifest

    def _beside(self, path: str, manifests: dict[str, Manifest | None]) -> None:
        """An object of a generation's folder that no manifest names."""
        generation = names.generation_of(path)
        assert generation is not None
        if generation not in manifests and generation not in self._found.unfinished:
            self._found.unfinished.append(generation)
        if path == names.beginning(generation):
            self._object(path, partial(self._json, Beginning))
        elif path.startswith(f"{names.row_digests(generation)}/"):
            self._object(path, lambda path, data: decode_row_digests(data, path) and None)
        elif generation in self._found.unfinished or path.count("/") == 2:  # side objects lie right in the folder
            self._object(path, lambda path, data: None)

    def _current(self, manifests: dict[str, Manifest | None]) -> None:
        if names.CURRENT not in self._left:
            return

        def read(path: str, data: bytes) -> None:
            generation = load_json(Current, data, path).generation
            if generation not in manifests:
                raise CorruptObjectError(f"names generation {generation}, which isn't published: `plora generations activate` another one")

        self._object(names.CURRENT, read)

    def _object(self, path: str, verify: Callable[[str, bytes], None]) -> None:
        self._left.pop(path, None)
        data = self._objects.read_many([path]).get(path)
        if data is None:
            if path in self._listed and self._gone_with_its_generation(path):
                return
            self._found.problems.append(Problem(path, "is gone: restore it"))
            return
        self._found.objects += 1
        self._found.size += len(data)
        try:
            verify(path, data)
        except (StoreError, ValueError) as error:
            self._found.problems.append(Problem(path, str(error).removeprefix(path).strip()))
        self._on_objects(self._found.objects, len(self._listed))

    def _gone_with_its_generation(self, path: str) -> bool:
        """Whether the object was there when the check began, and its owner deleted it since."""
        generation = names.generation_of(path)
        return generation is None or not self._objects.exists(names.manifest(generation))

    @staticmethod
    def _json(kind: type[BaseModel], path: str, data: bytes) -> None:
        load_json(kind, data, path)

    @staticmethod
    def _shared(sha256: str, path: str, data: bytes) -> None:
        _same(data, sha256)
        decode_shared(data, path)

    def _segment(self, manifest: Manifest, reference: SegmentRef, path: str, data: bytes) -> None:
        _same(data, reference.sha256)
        segment = decode_segment(data, path)
        layout = segment.layout
        given = (layout.generation, layout.kind, layout.wave, layout.width, layout.users, int(segment.examples.sum()), len(data))
        if given != (
            manifest.generation, manifest.kind, reference.wave, reference.width, reference.users, reference.examples, reference.size,
        ):  # fmt: skip
            raise CorruptObjectError("isn't what its manifest says: restore it or train again")
        if (segment.keys[0].tobytes().hex(), segment.keys[-1].tobytes().hex()) != (reference.first_key, reference.last_key):
            raise CorruptObjectError("holds other users than its manifest says: restore it or train again")
        place = Place(manifest.generation, manifest.shared.sha256, manifest.kind)
        self._decryption.check_records(segment.keys, segment.records, place, path)

    @staticmethod
    def _examples(path: str, data: bytes) -> None:
        if decode_examples(data, path)[0] != names.examples_key(path):
            raise CorruptObjectError("holds another user's examples: delete it")

    @staticmethod
    def _uses(path: str, data: bytes) -> None:
        decode_uses(data, path)

    def _fresh(self, path: str, data: bytes) -> None:
        found = decode_fresh(data, path)
        if found.key != names.fresh_key(path):
            raise CorruptObjectError("holds another user's adapter: delete it")
        if found.adapter is not None:
            self._decryption.check_fresh(found.adapter)


def _same(data: bytes, sha256: str) -> None:
    if hashlib.sha256(data).hexdigest() != sha256:
        raise CorruptObjectError("isn't what was published, its SHA-256 differs: restore it or train again")
