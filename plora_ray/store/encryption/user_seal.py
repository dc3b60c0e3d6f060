"""A user's other bytes, sealed under the same data key as the user's records: what is kept beside an adapter goes with it.

Makes no data key: whoever has something to keep has an adapter, or was erased meanwhile.
"""

from __future__ import annotations

from plora_ray.errors import ErasedDuringFit
from plora_ray.store.encryption.records import UnreadableRecord
from plora_ray.store.encryption.sealing import SealBroken, seal, unseal
from plora_ray.store.encryption.user_keys import UserKeys


class UserSeal:
    """Wraps a user's bytes, bound to the store, the user and `purpose`, which is a word for what they are."""

    def __init__(self, keys: UserKeys, purpose: str) -> None:
        self._keys, self._purpose = keys, purpose.encode()

    def sealed(self, key: bytes, plain: bytes) -> bytes:
        """Raises ErasedDuringFit for a user without a data key."""
        data_key = self._keys.get(key)
        if data_key is None:
            raise ErasedDuringFit("the user was erased meanwhile; nothing was written")
        return seal(data_key, plain, *self._bound_to(key))

    def opened(self, key: bytes, sealed: bytes, name: str) -> bytes:
        """Raises UnreadableRecord naming `name` if the user's data key is gone or another one."""
        data_key = self._keys.get(key)
        try:
            if data_key is None:
                raise SealBroken
            return unseal(data_key, sealed, *self._bound_to(key))
        except SealBroken as error:
            raise UnreadableRecord(f"{name} can't be decrypted: its user was erased, or it is another's; delete it") from error

    def _bound_to(self, key: bytes) -> tuple[bytes, ...]:
        return self._purpose, self._keys.store_id.encode(), key
