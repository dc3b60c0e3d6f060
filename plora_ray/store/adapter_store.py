"""The adapter store: published generations, which of them serves, every user's fresh adapter, and who was erased.

Knows how these four join into the one adapter a user is served. Knows bytes and tensors, no model; user ids only to hash them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from plora_ray.errors import CorruptObjectError, ErasedDuringFit, StoreError
from plora_ray.identity import user_key, validate_user_id
from plora_ray.store import names
from plora_ray.store.adapters import (
    FreshObject,
    UserAdapter,
    check_adapter,
    decode_fresh,
    encode_erased,
    encode_fresh,
    new_version,
    now_iso,
)
from plora_ray.store.manifest import Beginning, Current, Manifest, Tombstone, check_generation_id, dump_json, load_json
from plora_ray.store.object_errors import ObjectExists
from plora_ray.store.objects import SERVING_RETRY_S, ObjectRange, ObjectStore
from plora_ray.store.reader import GenerationReader
from plora_ray.store.retained import forget_examples
from plora_ray.store.store_identity import open_identity
from plora_ray.store.tombstones import Tombstones, tombstone_version, write_tombstone
from plora_ray.store.writer import GenerationWriter


@dataclass(frozen=True)
class GenerationInfo:
    """One published generation, in a few words."""

    generation: str
    created_at: str
    kind: str
    users: int
    examples: int
    model: str
    is_current: bool


class AdapterStore:
    """The store at `uri` (a path, file://, s3:// or memory://); made if it is missing, unless create=False.

    storage_options  for s3://: key, secret, endpoint_url, client_kwargs, ... as fsspec takes them
    secret           16 to 64 bytes that key the user hash, kept outside the store; the environment's PLORA_STORE_KEY does the
                     same. With neither, a new store draws a key of its own and keeps it in store.json.
    retry_s          how long passing failures of the storage are ridden out, in every call

    Raises StoreError if there is no store (create=False), if it can't be read, or if it was made with another key; a new store
    must first prove that it honours conditional writes. Threads may share it, and other processes may get a copy.
    """

    def __init__(
        self,
        uri: str,
        storage_options: dict[str, Any] | None = None,
        secret: bytes | None = None,
        *,
        create: bool = True,
        retry_s: float = SERVING_RETRY_S,
    ) -> None:
        self.objects = ObjectStore(uri, storage_options, retry_s=retry_s)
        self.store_id, self._secret = open_identity(self.objects, secret, create)
        self._tombstones = Tombstones(self.objects)  # one for the store and all its readers

    @classmethod
    def open(
        cls,
        uri: str,
        storage_options: dict[str, Any] | None = None,
        create: bool = False,
        secret: bytes | None = None,
        retry_s: float = SERVING_RETRY_S,
    ) -> AdapterStore:
        """The store at `uri`, which must exist unless `create`."""
        return cls(uri, storage_options, secret, create=create, retry_s=retry_s)

    def __repr__(self) -> str:
        return f"AdapterStore({self.uri!r})"

    @property
    def uri(self) -> str:
        return self.objects.uri

    @property
    def hash_secret(self) -> bytes:
        """What keys the user hash: whoever partitions rows by user needs it. Never to be logged or stored elsewhere."""
        return self._secret

    def key(self, user_id: str) -> bytes:
        """The user's 16-byte key in this store. Raises InvalidUserId."""
        return user_key(validate_user_id(user_id), self._secret)

    # Generations

    def generations(self) -> list[GenerationInfo]:
        """All published generations, oldest first; unfinished ones don't exist yet."""
        current = self.current()
        found = self.objects.read_many(names.manifest(name) for name in self.objects.folders(names.GENERATIONS))
        manifests = [load_json(Manifest, data, self.objects.uri_of(path)) for path, data in found.items()]
        return [
            GenerationInfo(m.generation, m.created_at, m.kind, m.users, m.examples, m.model.name, m.generation == current)
            for m in sorted(manifests, key=lambda m: (m.created_at, m.generation))
        ]

    def manifest(self, generation: str) -> Manifest | None:
        """The manifest of a published generation; None if there is none of this name."""
        path = names.manifest(check_generation_id(generation))
        data = self.objects.read_many([path]).get(path)
        return None if data is None else load_json(Manifest, data, self.objects.uri_of(path))

    def current(self) -> str | None:
        """The generation that serves; None before the first is published."""
        data = self.objects.read_many([names.CURRENT]).get(names.CURRENT)
        return None if data is None else load_json(Current, data, self.objects.uri_of(names.CURRENT)).generation

    def activate(self, generation: str) -> None:
        """Make a published generation the current one, forward or back. Raises StoreError, naming those there are, if it isn't."""
        self._published(generation)
        self.objects.write(names.CURRENT, dump_json(Current(generation=generation)))

    def succeed(self, base: str, generation: str) -> bool:
        """Make `generation` the current one if that is still `base` (or `generation` already); whether it is current now."""
        self._published(generation)
        mine, name = dump_json(Current(generation=generation)), self.objects.uri_of(names.CURRENT)

        def after_base(data: bytes | None) -> bytes | None:
            return mine if data is not None and load_json(Current, data, name).generation == base else None

        standing = self.objects.update(names.CURRENT, after_base)
        return standing is not None and load_json(Current, standing, name).generation == generation

    def begin(self, generation: str, kind: str = "plora") -> GenerationWriter:
        """Begin to write a generation, or go on with an unfinished one.

        Raises StoreError if it is published already, was begun with another kind, or the store can't be written safely.
        """
        if self.manifest(generation) is not None:
            raise StoreError(f"generation {generation} is published already and can't be changed: choose another name")
        self.objects.probe()
        path = names.beginning(generation)
        beginning = Beginning(generation=generation, version=new_version(), kind=kind)
        try:
            self.objects.create(path, dump_json(beginning))
        except ObjectExists:
            beginning = load_json(Beginning, self.objects.read(path), self.objects.uri_of(path))
        if beginning.kind != kind:
            raise StoreError(f"generation {generation} was begun with kind {beginning.kind!r}, not {kind!r}: choose another name")
        return GenerationWriter(self.objects, beginning, self.activate)

    def resume(self, generation: str) -> GenerationWriter:
        """A writer of a generation that another process has begun. Raises StoreError if nobody has."""
        path = names.beginning(check_generation_id(generation))
        data = self.objects.read_many([path]).get(path)
        if data is None:
            raise StoreError(f"generation {generation} was never begun: begin it first")
        return GenerationWriter(self.objects, load_json(Beginning, data, self.objects.uri_of(path)), self.activate)

    def open_generation(self, generation: str | None = None) -> GenerationReader:
        """A reader of the given or the current generation. Raises StoreError if there is none, CorruptObjectError if damaged."""
        wanted = generation if generation is not None else self.current()
        if wanted is None:
            raise StoreError(f"{self.uri} has no generation yet: run train-all first")
        self._tombstones.refresh()
        return GenerationReader(self.objects, self._published(wanted), self._tombstones)

    # Users

    def put_fresh(self, adapter: UserAdapter, *, known_erasure: str | None = None) -> None:
        """Store a user's newly fitted adapter; once this returns, it or a newer one is what `get_fresh` gives.

        known_erasure: version of the user's last erasure that was known when the fit began, "" for none. With it, any other
        erasure since is noticed whatever the clocks of the machines say; without it, versions are compared.

        Raises StoreError, with nothing written, if the adapter isn't finite or well-formed; ErasedDuringFit if the user was
        erased after the fit began (a fit that was running when the user left mustn't bring the user back).
        """
        check_adapter(adapter)
        path = names.fresh(adapter.key)
        erased = tombstone_version(self.objects, adapter.key)

        def newest(data: bytes | None) -> bytes | None:
            standing = self._decode_or_none(adapter.key, data)
            erased_version = _latest(erased, standing.erased_version if standing else None)
            unexpected = known_erasure is not None and (erased_version or "") != known_erasure
            if unexpected or (erased_version is not None and adapter.version <= erased_version):
                raise ErasedDuringFit(f"{self.objects.uri_of(path)}: the user was erased after this fit began; nothing was written")
            if standing and standing.adapter and standing.adapter.version >= adapter.version:
                return None
            return encode_fresh(adapter, erased_version)

        self.objects.update(path, newest)

    def get_fresh(self, key: bytes) -> UserAdapter | None:
        """The user's fresh adapter, whatever generation it belongs to; None if there is none. Raises CorruptObjectError."""
        path = names.fresh(key)
        standing = self._decode(key, self.objects.read_many([path]).get(path))
        return standing.adapter if standing else None

    def pull(self, reader: GenerationReader, key: bytes) -> UserAdapter | None:
        """The adapter to serve this user with, from the store: two requests at the same time, however many users there are.

        The newer of the fresh adapter (if it was fitted with this generation's shared weights) and the generation's own; None
        for a user with neither, and for an erased one. Honours an erasure even before the reader's tombstones are refreshed.
        Raises CorruptObjectError if the bytes can't be proven to be this user's.
        """
        position = reader.lookup(key)
        wanted = [ObjectRange(names.fresh(key))]
        if position is not None:
            wanted.append(reader.record_range(position))
        fresh_data, *record = self.objects.read_ranges(wanted)
        standing = self._decode(key, fresh_data)
        erased = _latest(reader.erased_version(key), standing.erased_version if standing else None)
        outdated = max(erased or "", reader.manifest.version if position is not None else "")
        fresh = standing.adapter if standing else None
        if fresh and fresh.basis == reader.basis and fresh.version > outdated:
            return fresh
        if position is None or erased is not None:
            return None
        return reader.adapter_at(position, record[0])

    def erase(self, key: bytes) -> str:
        """Erase the user for good: no segment's record of this key is served again, and no adapter fitted before now.

        Returns the erasure's version. The user's fresh adapter is gone when this returns; erasing again is fine.
        """
        path = names.fresh(key)
        standing = self._decode_or_none(key, self.objects.read_many([path]).get(path))
        version = new_version(after=standing.adapter.version if standing and standing.adapter else None)

        def emptied(data: bytes | None) -> bytes | None:
            found = self._decode_or_none(key, data)
            if found and found.erased_version and found.erased_version >= version:
                return None  # the user came back in the meantime, or was erased again: whoever wrote it knew of this erasure
            return encode_erased(key, version)

        write_tombstone(self.objects, key, Tombstone(version=version, erased_at=now_iso()))
        forget_examples(self.objects, key)
        self.objects.update(path, emptied)
        return version

    def tombstones(self) -> dict[bytes, str]:
        """Every erased user's key, with the version of the erasure. Reads only what is new since the last call."""
        self._tombstones.refresh()
        return self._tombstones.as_dict()

    def is_erased(self, key: bytes) -> bool:
        """Whether the user was erased and has no adapter fitted since."""
        erased = tombstone_version(self.objects, key)
        if erased is None:
            return False
        fresh = self.get_fresh(key)
        return fresh is None or fresh.version <= erased

    def _published(self, generation: str) -> Manifest:
        manifest = self.manifest(generation)
        if manifest is None:
            existing = [info.generation for info in self.generations()]
            raise StoreError(f"{self.uri} has no generation {generation}; it has {', '.join(existing) or 'none'}")
        return manifest

    def _decode(self, key: bytes, data: bytes | None) -> FreshObject | None:
        if data is None:
            return None
        name = self.objects.uri_of(names.fresh(key))
        standing = decode_fresh(data, name)
        if standing.key != key:
            raise CorruptObjectError(f"{name} holds another user's adapter: delete it")
        return standing

    def _decode_or_none(self, key: bytes, data: bytes | None) -> FreshObject | None:
        """As `_decode`, but a damaged object counts as none: what replaces it mends the store."""
        try:
            return self._decode(key, data)
        except CorruptObjectError:
            return None


def _latest(*versions: str | None) -> str | None:
    return max((version for version in versions if version is not None), default=None)
