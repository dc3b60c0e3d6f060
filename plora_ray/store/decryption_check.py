"""What a check of an encrypted store proves beyond digests: that everybody who wasn't erased has a data key, and that it opens the record.

Without the root key only the first. Knows records and keys; `fsck.py` knows which objects there are.
"""

from __future__ import annotations

import numpy as np

from plora_ray.errors import CorruptObjectError
from plora_ray.store.adapter_store import AdapterStore
from plora_ray.store.adapters import UserAdapter
from plora_ray.store.encryption.sealing import Place, is_sealed


class DecryptionCheck:
    """The part of a check that needs the data keys; nothing in a store without encryption."""

    def __init__(self, store: AdapterStore) -> None:
        self._store = store
        self._users: set[bytes] = set()

    @property
    def users(self) -> int:
        """Users who have a data key."""
        return len(self._users)

    def learn(self, path: str, data: bytes) -> None:
        """Check the key shard at `path` and remember whose keys it holds. Raises CorruptObjectError."""
        assert self._store.keys is not None
        self._users |= set(self._store.keys.checked(path, data))

    def check_records(self, users: np.ndarray, stored: np.ndarray, place: Place, name: str) -> None:
        """Check a segment's records, uint8 [users, 28 + 4 width]. users: uint8 [users, 16]. Raises CorruptObjectError."""
        if not self._store.encrypted:
            return
        if not is_sealed(stored):
            raise CorruptObjectError("isn't encrypted although its store is: delete it")
        keys = [user.tobytes() for user in users]
        erased = self._store.tombstones().keys()
        records = {key: (stored[row], place) for row, key in enumerate(keys) if key not in erased}
        lacking = len(records.keys() - self._users)
        if lacking:
            raise CorruptObjectError(f"has {lacking} users whose data keys are gone: restore their shards below keys/")
        if not self._locked and set(self._store.records.open_many(records, name)[1]) - self._store.tombstones().keys():
            raise CorruptObjectError("holds records that their data keys don't open: restore it or train again")

    def check_fresh(self, adapter: UserAdapter) -> None:
        """Check a fresh adapter. Raises CorruptObjectError."""
        if not self._locked:
            self._store.fresh.opened(adapter)
        elif adapter.key not in self._users and adapter.version > (self._store.tombstones().get(adapter.key) or ""):
            raise CorruptObjectError("has no data key: restore its shard below keys/")

    @property
    def _locked(self) -> bool:
        return self._store.keys is not None and self._store.keys.locked
