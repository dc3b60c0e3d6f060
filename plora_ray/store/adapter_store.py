"""The adapter store: published generations, which of them serves, every user's fresh adapter, and who was erased.

Knows how these four join into the one adapter a user is served. Knows bytes and tensors, no model; user ids only to hash them.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, TypeVar

from plora_ray.errors import CorruptObjectError, StoreError
from plora_ray.identity import user_key, validate_user_id
from plora_ray.store import names
from plora_ray.store.adapters import UserAdapter, new_version, now_iso
from plora_ray.store.canary import Canary, end_canary, read_canary, write_canary
from plora_ray.store.encryption.records import Records
from plora_ray.store.encryption.root_key import RootKeySource
from plora_ray.store.encryption.user_keys import UserKeys
from plora_ray.store.encryption.user_seal import UserSeal
from plora_ray.store.fresh import FreshAdapters
from plora_ray.store.manifest import Beginning, Current, Manifest, Tombstone, check_generation_id, dump_json, load_json
from plora_ray.store.object_errors import ObjectExists
from plora_ray.store.objects import SERVING_RETRY_S, ObjectStore
from plora_ray.store.pulling import Puller
from plora_ray.store.reader import GenerationReader
from plora_ray.store.record_cache import RecordCache
from plora_ray.store.retained import RetainedExamples, forget_examples
from plora_ray.store.store_identity import open_identity
from plora_ray.store.tombstones import Tombstones, tombstone_version, write_tombstone
from plora_ray.store.writer import GenerationWriter

_OfGeneration = TypeVar("_OfGeneration", Manifest, Beginning)


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
    """The store at `uri` (a path, file://, s3://, memory:// or what else `backends.py` opens); made if it is missing, unless create=False.

    storage_options  as fsspec's file system takes them; for s3://: key, secret, endpoint_url, client_kwargs, ...
    secret           16 to 64 bytes that key the user hash, kept outside the store; the environment's PLORA_STORE_KEY does the
                     same. With neither, a new store draws a key of its own and keeps it in store.json.
    retry_s          how long passing failures of the storage are ridden out, in every call
    encryption       where the root key of an encrypted store comes from; with it, a new store is an encrypted one
    locked           open an encrypted store without its root key: no adapter can be read or written, all else can

    Raises StoreError if there is no store (create=False), if it can't be read, or if it was made with other keys; a new store
    must first prove that it honours conditional writes. Threads may share it, and other processes may get a copy.
    fresh: the objects below users/. records: seals and opens. keys: the users' data keys; None in a store without encryption.
    """

    def __init__(
        self,
        uri: str,
        storage_options: dict[str, Any] | None = None,
        secret: bytes | None = None,
        *,
        create: bool = True,
        retry_s: float = SERVING_RETRY_S,
        encryption: RootKeySource | None = None,
        locked: bool = False,
    ) -> None:
        self.objects = ObjectStore(uri, storage_options, retry_s=retry_s)
        identity, self._secret = open_identity(self.objects, secret, create, encrypt=encryption is not None)
        self.store_id = identity.store_id
        self._tombstones = Tombstones(self.objects)  # one for the store and all its readers
        self.keys = self._user_keys(encryption, create, locked) if identity.encryption else None
        self.records = Records(self.keys)
        if encryption is not None and not self.encrypted:
            raise StoreError(f"{self.uri} was made without encryption: unset store.encryption or copy into an encrypted store")
        self.fresh = FreshAdapters(self.objects, self.records)
        self._puller = Puller(self.objects, self.fresh, self.keys)

    @classmethod
    def open(
        cls,
        uri: str,
        storage_options: dict[str, Any] | None = None,
        create: bool = False,
        secret: bytes | None = None,
        retry_s: float = SERVING_RETRY_S,
        encryption: RootKeySource | None = None,
        locked: bool = False,
    ) -> AdapterStore:
        """The store at `uri`, which must exist unless `create`."""
        return cls(uri, storage_options, secret, create=create, retry_s=retry_s, encryption=encryption, locked=locked)

    def __repr__(self) -> str:
        return f"AdapterStore({self.uri!r})"

    @property
    def uri(self) -> str:
        return self.objects.uri

    @property
    def encrypted(self) -> bool:
        """Whether what it holds of users is encrypted; fixed when the store is made."""
        return self.keys is not None

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
        manifests = [self._load_own(Manifest, path, data) for path, data in found.items()]
        return [
            GenerationInfo(m.generation, m.created_at, m.kind, m.users, m.examples, m.model.name, m.generation == current)
            for m in sorted(manifests, key=lambda m: (m.created_at, m.generation))
        ]

    def manifest(self, generation: str) -> Manifest | None:
        """The manifest of a published generation; None if there is none of this name."""
        path = names.manifest(check_generation_id(generation))
        data = self.objects.read_many([path]).get(path)
        return None if data is None else self._load_own(Manifest, path, data)

    def current(self) -> str | None:
        """The generation that serves; None before the first is published."""
        data = self.objects.read_many([names.CURRENT]).get(names.CURRENT)
        return None if data is None else load_json(Current, data, self.objects.uri_of(names.CURRENT)).generation

    def activate(self, generation: str) -> None:
        """Make a published generation the current one, forward or back, for everybody: a canary ends.

        Raises StoreError, naming those there are, if it isn't published.
        """
        self._published(generation)
        self.objects.write(names.CURRENT, dump_json(Current(generation=generation)))
        end_canary(self.objects)

    def canary(self) -> Canary | None:
        """The generation that answers for a share of the users, if there is one beside the current."""
        canary = read_canary(self.objects)
        return canary if canary is not None and canary.generation != self.current() else None

    def set_canary(self, generation: str, share: float) -> None:
        """Let a published generation answer for `share` of the users; 0 ends it. Raises StoreError if it can't."""
        if not 0 <= share <= 1:
            raise StoreError(f"share is {share}: it must lie between 0 (nobody) and 1 (everybody)")
        if share == 0:
            end_canary(self.objects)
            return
        self._published(generation)
        if generation == self.current():
            raise StoreError(f"generation {generation} serves everybody already: a canary is another one")
        write_canary(self.objects, Canary(generation=generation, share=float(share)))

    def succeed(self, base: str, generation: str) -> bool:
        """Make `generation` the current one if that is still `base` (or `generation` already); whether it is current now."""
        self._published(generation)
        mine, name = dump_json(Current(generation=generation)), self.objects.uri_of(names.CURRENT)

        def after_base(data: bytes | None) -> bytes | None:
            return mine if data is not None and load_json(Current, data, name).generation == base else None

        standing = self.objects.update(names.CURRENT, after_base)
        succeeded = standing is not None and load_json(Current, standing, name).generation == generation
        if succeeded:
            end_canary(self.objects)
        return succeeded

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
            beginning = self._load_own(Beginning, path, self.objects.read(path))
        if beginning.kind != kind:
            raise StoreError(f"generation {generation} was begun with kind {beginning.kind!r}, not {kind!r}: choose another name")
        return GenerationWriter(self.objects, self.records, beginning, self.activate)

    def resume(self, generation: str) -> GenerationWriter:
        """A writer of a generation that another process has begun. Raises StoreError if nobody has."""
        path = names.beginning(check_generation_id(generation))
        data = self.objects.read_many([path]).get(path)
        if data is None:
            raise StoreError(f"generation {generation} was never begun: begin it first")
        return GenerationWriter(self.objects, self.records, self._load_own(Beginning, path, data), self.activate)

    def open_generation(self, generation: str | None = None) -> GenerationReader:
        """A reader of the given or the current generation. Raises StoreError if there is none, CorruptObjectError if damaged."""
        wanted = generation if generation is not None else self.current()
        if wanted is None:
            raise StoreError(f"{self.uri} has no generation yet: run train-all first")
        self._tombstones.refresh()
        if self.keys is not None:
            self.keys.look_around()
        return GenerationReader(self.objects, self.records, self._published(wanted), self._tombstones)

    # Users

    def put_fresh(self, adapter: UserAdapter, *, known_erasure: str | None = None) -> None:
        """Store a user's newly fitted adapter; once this returns, it or a newer one is what `get_fresh` gives.

        known_erasure: version of the user's last erasure that was known when the fit began, "" for none. With it, any other
        erasure since is noticed whatever the clocks of the machines say; without it, versions are compared.

        Raises StoreError, with nothing written, if the adapter isn't finite or well-formed; ErasedDuringFit if the user was
        erased after the fit began (a fit that was running when the user left mustn't bring the user back).
        """
        self.fresh.put(adapter, known_erasure)

    def get_fresh(self, key: bytes) -> UserAdapter | None:
        """The user's fresh adapter, whatever generation it belongs to; None if there is none. Raises CorruptObjectError."""
        return self.fresh.get(key)

    def pull(
        self, reader: GenerationReader, key: bytes, *, records: RecordCache | None = None, may_be_fresh: bool = True
    ) -> UserAdapter | None:
        """The adapter to serve this user with, from the store: two requests at the same time (encrypted: three), however large it is.

        The newer of the fresh adapter (if it was fitted with this generation's shared weights) and the generation's own; None
        for a user with neither, and for an erased one. Honours an erasure even before the reader's tombstones are refreshed.
        records: where the generation's record is looked for first. may_be_fresh=False: the caller knows of no fresh adapter,
        which saves the request for it. Raises CorruptObjectError if the bytes can't be proven to be this user's.
        """
        plan = self._puller.plan(reader, key, records, may_be_fresh)
        return self._puller.settle(reader, plan, self.objects.read_ranges(plan.ranges), records)

    async def pull_async(self, reader: GenerationReader, key: bytes) -> UserAdapter | None:
        """As `pull`, without blocking the event loop; any number may wait at once, the store reads for a few at a time."""
        plan = self._puller.plan(reader, key, None, True)
        found = await self.objects.read_ranges_async(plan.ranges)
        if self.keys is None:
            return self._puller.settle(reader, plan, found, None)
        return await asyncio.to_thread(self._puller.settle, reader, plan, found, None)  # may have to read the key shard as a whole

    def fresh_tags(self) -> dict[bytes, str]:
        """Every user with a fresh object, erased ones included, and a tag that changes when it is replaced. One listing."""
        listed = ((names.fresh_key(item.path), item.tag) for item in self.objects.list(names.FRESH))
        return {key: tag for key, tag in listed if key is not None}

    def erase(self, key: bytes) -> str:
        """Erase the user for good: no segment's record of this key is served again, and no adapter fitted before now.

        Returns the erasure's version. The user's data key and fresh adapter are gone when this returns; erasing again is fine.
        """
        path = names.fresh(key)
        standing = self.fresh.standing_or_none(key, self.objects.read_many([path]).get(path))
        version = new_version(after=standing.adapter.version if standing and standing.adapter else None)
        # The tombstone comes first: from there on nobody serves the user or makes a data key, whatever happens to this process.
        write_tombstone(self.objects, key, Tombstone(version=version, erased_at=now_iso()))
        if self.keys is not None:
            self.keys.destroy(key, version)
        forget_examples(self.objects, key)
        self.fresh.empty(key, version)
        return version

    def retained_examples(self, days: int) -> RetainedExamples:
        """The users' examples that are kept for `days` days; sealed under the users' data keys if the store is encrypted."""
        return RetainedExamples(self.objects, days, None if self.keys is None else UserSeal(self.keys, "plora-examples"))

    def tombstones(self) -> dict[bytes, str]:
        """Every erased user's key, with the version of the erasure. Reads only what is new since the last call."""
        self._tombstones.refresh()
        return self._tombstones.as_dict()

    def is_erased(self, key: bytes) -> bool:
        """Whether the user was erased and has no adapter fitted since."""
        erased = tombstone_version(self.objects, key)
        if erased is None:
            return False
        standing = self.fresh.read(key)
        return standing is None or standing.adapter is None or standing.adapter.version <= erased

    def _user_keys(self, source: RootKeySource | None, create: bool, locked: bool) -> UserKeys:
        keys = UserKeys(self.objects, self.store_id, source)
        if not (locked and source is None):
            keys.open(create=create)
        return keys

    def _published(self, generation: str) -> Manifest:
        manifest = self.manifest(generation)
        if manifest is None:
            existing = [info.generation for info in self.generations()]
            raise StoreError(f"{self.uri} has no generation {generation}; it has {', '.join(existing) or 'none'}")
        return manifest

    def _load_own(self, kind: type[_OfGeneration], path: str, data: bytes) -> _OfGeneration:
        """The document of the generation in whose folder it lies. Raises CorruptObjectError if it is another's."""
        document = load_json(kind, data, self.objects.uri_of(path))
        if document.generation != names.generation_of(path):
            raise CorruptObjectError(f"{self.objects.uri_of(path)} belongs to generation {document.generation}: restore it")
        return document
