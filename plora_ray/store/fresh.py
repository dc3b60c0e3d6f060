"""Users' fresh adapters below users/: stored, read and emptied, one object a user.

Knows which of several writers wins, and that nobody who was erased comes back by a late write. Knows nothing of generations.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from plora_ray.errors import CorruptObjectError, ErasedDuringFit
from plora_ray.store import names
from plora_ray.store.adapters import FreshObject, UserAdapter, check_adapter, decode_fresh, encode_erased, encode_fresh
from plora_ray.store.encryption.records import Records, UnreadableRecord
from plora_ray.store.objects import ObjectStore
from plora_ray.store.tombstones import tombstone_version


class FreshAdapters:
    """The fresh adapters of one store; threads and processes may share them."""

    def __init__(self, objects: ObjectStore, records: Records) -> None:
        self._objects, self._records = objects, records

    def put(self, adapter: UserAdapter, known_erasure: str | None) -> None:
        """As AdapterStore.put_fresh."""
        check_adapter(adapter)
        path = names.fresh(adapter.key)
        erased = tombstone_version(self._objects, adapter.key)

        stored = self.sealed(adapter, known_erasure)

        def newest(data: bytes | None) -> bytes | None:
            standing = self.standing_or_none(adapter.key, data)
            erased_version = latest(erased, standing.erased_version if standing else None)
            self._admit(adapter, known_erasure, erased_version)
            if standing and standing.adapter and standing.adapter.version >= adapter.version:
                return None
            return encode_fresh(stored, erased_version)

        self._objects.update(path, newest)

    def sealed(self, adapter: UserAdapter, known_erasure: str | None = None) -> UserAdapter:
        """The adapter as it is stored. Raises ErasedDuringFit for a user erased since, as `put` does, before any data key is made."""
        if self._records.keys is None:
            return adapter
        data_key = self._records.keys.for_adapter(adapter.key, partial(self._admit, adapter, known_erasure))
        return replace(adapter, record=self._records.seal(adapter.key, adapter.record, adapter.fresh_place, data_key))

    def _admit(self, adapter: UserAdapter, known_erasure: str | None, erased_version: str | None) -> None:
        """Raises ErasedDuringFit unless the adapter may be stored for a user last erased at `erased_version`."""
        unexpected = known_erasure is not None and (erased_version or "") != known_erasure
        if unexpected or (erased_version is not None and adapter.version <= erased_version):
            name = self._objects.uri_of(names.fresh(adapter.key))
            raise ErasedDuringFit(f"{name}: the user was erased after this fit began; nothing was written")

    def opened(self, adapter: UserAdapter, key_part: bytes | None = None) -> UserAdapter | None:
        """The adapter with its record in plain numbers; None if the user has just been erased. Raises CorruptObjectError.

        key_part: what was read of the user's key shard, if anything.
        """
        name = self._objects.uri_of(names.fresh(adapter.key))
        try:
            return replace(adapter, record=self._records.open(adapter.key, adapter.record, adapter.fresh_place, name, key_part))
        except UnreadableRecord:
            erased = tombstone_version(self._objects, adapter.key)
            if erased is not None and erased >= adapter.version:
                return None
            raise

    def opened_many(self, adapters: list[UserAdapter]) -> list[UserAdapter]:
        """As `opened` of each, without those of users who have just been erased; each key shard is read at most once."""
        opened, _ = self._records.open_many(
            {item.key: (item.record, item.fresh_place) for item in adapters}, self._objects.uri_of(names.FRESH)
        )
        found = (replace(item, record=opened[item.key]) if item.key in opened else self.opened(item) for item in adapters)
        return [adapter for adapter in found if adapter is not None]

    def get(self, key: bytes) -> UserAdapter | None:
        """As AdapterStore.get_fresh."""
        standing = self.read(key)
        return self.opened(standing.adapter) if standing and standing.adapter else None

    def read(self, key: bytes) -> FreshObject | None:
        """What stands there, its record as it is stored. Raises CorruptObjectError."""
        path = names.fresh(key)
        return self.standing(key, self._objects.read_many([path]).get(path))

    def empty(self, key: bytes, version: str) -> None:
        """Leave nothing but the note that the user was erased at `version`."""

        def emptied(data: bytes | None) -> bytes | None:
            found = self.standing_or_none(key, data)
            if found and found.erased_version and found.erased_version >= version:
                return None  # the user came back in the meantime, or was erased again: whoever wrote it knew of this erasure
            return encode_erased(key, version)

        self._objects.update(names.fresh(key), emptied)

    def standing(self, key: bytes, data: bytes | None) -> FreshObject | None:
        """The object in `data`, which was read from the user's place. Raises CorruptObjectError."""
        if data is None:
            return None
        name = self._objects.uri_of(names.fresh(key))
        found = decode_fresh(data, name)
        if found.key != key:
            raise CorruptObjectError(f"{name} holds another user's adapter: delete it")
        return found

    def standing_or_none(self, key: bytes, data: bytes | None) -> FreshObject | None:
        """As `standing`, but a damaged object counts as none: what replaces it mends the store."""
        try:
            return self.standing(key, data)
        except CorruptObjectError:
            return None


def latest(*versions: str | None) -> str | None:
    """The latest of the versions that there are."""
    return max((version for version in versions if version is not None), default=None)
