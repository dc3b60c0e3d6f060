"""Records on their way into the store and out of it: sealed if the store is encrypted, else handed through.

A record in memory is float32 [width]. As it is stored, it is that or, sealed, uint8 [12 + 4 width + 16]; its type tells which. A sealed
one is bound to the store, the user, and a `Place`: no other one opens. Knows nothing of where records lie.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from plora_ray.errors import CorruptObjectError
from plora_ray.store.encryption.sealing import Place, SealBroken, is_sealed, seal, stored_bytes, unseal
from plora_ray.store.encryption.user_keys import UserKeys


class UnreadableRecord(CorruptObjectError):
    """The user's data key is gone, or isn't the one the record was sealed under: the user was erased, or an object was exchanged."""


class Records:
    """Seals and opens the records of one store. keys: None for a store without encryption."""

    def __init__(self, keys: UserKeys | None) -> None:
        self.keys = keys

    @property
    def sealed(self) -> bool:
        """Whether records of this store are sealed."""
        return self.keys is not None

    def seal_wave(self, users: np.ndarray, records: np.ndarray, place: Place) -> np.ndarray:
        """Records float32 [users, width] as they are stored. users: uint8 [users, 16]; their data keys stand when this returns."""
        if self.keys is None:
            return records
        keys = [user.tobytes() for user in users]
        stored = np.empty((len(users), stored_bytes(records.shape[1], True)), np.uint8)
        for row, (user, data_key) in enumerate(zip(keys, self.keys.for_records(keys), strict=True)):
            stored[row] = self.seal(user, records[row], place, data_key)
        return stored

    def seal(self, user: bytes, record: np.ndarray, place: Place, data_key: bytes) -> np.ndarray:
        """One record float32 [width], sealed: uint8 [width * 4 + 28]."""
        assert self.keys is not None
        plain = np.ascontiguousarray(record, "<f4").tobytes()
        return np.frombuffer(seal(data_key, plain, *place.parts(self.keys.store_id, user)), np.uint8)

    def open(self, user: bytes, stored: np.ndarray, place: Place, name: str, part: bytes | None = None) -> np.ndarray:
        """The record float32 [width]. part: what was read of the user's key shard, if anything.

        Raises UnreadableRecord naming `name`. A key that doesn't fit is read once more: the user may have come back meanwhile.
        """
        if not is_sealed(stored):
            return self._plain(stored, name)
        keys = self._keys(name)
        data_key = keys.in_part(user, part)
        try:
            return self._opened(user, stored, place, name, data_key)
        except UnreadableRecord:
            newer = keys.get(user)
            if newer == data_key:
                raise
            return self._opened(user, stored, place, name, newer)

    def open_many(self, stored: Mapping[bytes, tuple[np.ndarray, Place]], name: str) -> tuple[dict[bytes, np.ndarray], list[bytes]]:
        """Records by user, and the users whose record can't be opened. stored: by user, as stored, with its place. Reads shards once."""
        if not any(is_sealed(record) for record, _ in stored.values()):
            return {user: self._plain(record, name) for user, (record, _) in stored.items()}, []
        data_keys = self._keys(name).get_many(stored)
        opened, unreadable = {}, []
        for user, (record, place) in stored.items():
            try:
                opened[user] = self._opened(user, record, place, name, data_keys.get(user))
            except UnreadableRecord:
                unreadable.append(user)
        return opened, unreadable

    def _opened(self, user: bytes, stored: np.ndarray, place: Place, name: str, data_key: bytes | None) -> np.ndarray:
        if data_key is None:
            raise UnreadableRecord(f"{name} holds a record whose data key is gone: restore the user's shard below keys/")
        try:
            return np.frombuffer(unseal(data_key, stored.tobytes(), *place.parts(self._keys(name).store_id, user)), "<f4")
        except SealBroken as error:
            raise UnreadableRecord(f"{name} holds a record that wasn't sealed for this user, generation and store: restore it") from error

    def _keys(self, name: str) -> UserKeys:
        if self.keys is None:
            raise CorruptObjectError(f"{name} is encrypted although its store isn't: restore it")
        return self.keys

    def _plain(self, stored: np.ndarray, name: str) -> np.ndarray:
        if self.keys is not None:
            raise CorruptObjectError(f"{name} isn't encrypted although its store is: delete it")
        return stored
