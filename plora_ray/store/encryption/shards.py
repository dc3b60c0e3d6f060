"""A key shard: the wrapped data keys of all users whose keys begin with one byte, as one safetensors file.

    rows  uint8 [users, 96]   ascending by user key, unique

    a row   user key [16]   born_after [16]   ring version [4], big-endian   wrapped data key [60]

born_after is the version of the user's last erasure when the data key was made (zeros: none): a key that was born before an erasure
is dead, whatever clocks say, and one made for a user who came back isn't. The wrapped key is sealed under the ring's key of that
version and bound to the store and the first 36 bytes of its row, so that a row proves itself: one can be read alone, wherever a
ranged read happens to begin. Metadata: format_version and a checksum of the rows. Knows bytes; reads and writes nothing.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from plora_ray.errors import CorruptObjectError
from plora_ray.identity import KEY_BYTES, as_words
from plora_ray.store.encryption import sealing
from plora_ray.store.encryption.ring import Ring
from plora_ray.store.segments import ascending
from plora_ray.store.tensorfile import TensorSpec, encode, parse_header

FORMAT_VERSION = "1"
VERSION_BYTES = 16
BOUND_BYTES = KEY_BYTES + VERSION_BYTES + 4
ROW_BYTES = BOUND_BYTES + sealing.KEY_BYTES + sealing.SEAL_BYTES
SLACK_SIGMAS = 4.0  # a row lies further from where it is expected once in 16,000 times
WHOLE_BYTES = 64 * 1024  # a smaller shard is read whole: that costs no more than a request
NEVER = bytes(VERSION_BYTES)
_PURPOSE = b"plora-data-key"


@dataclass(frozen=True)
class KeyRow:
    """One user's row. born_after: 16 bytes, comparable with `version_bytes` of an erasure. wrapped: uint8 bytes as stored."""

    user: bytes
    born_after: bytes
    ring_version: int
    wrapped: bytes

    @classmethod
    def parse(cls, row: bytes) -> KeyRow:
        """The row in these 96 bytes."""
        after = KEY_BYTES + VERSION_BYTES
        return cls(row[:KEY_BYTES], row[KEY_BYTES:after], int.from_bytes(row[after:BOUND_BYTES], "big"), row[BOUND_BYTES:])

    @classmethod
    def make(cls, user: bytes, born_after: bytes, data_key: bytes, ring: Ring, store_id: str) -> KeyRow:
        """A row that wraps `data_key` by the ring's newest key."""
        bound = _bound(user, born_after, ring.newest)
        wrapped = sealing.seal(ring.key(ring.newest), data_key, _PURPOSE, store_id.encode(), bound)
        return cls(user, born_after, ring.newest, wrapped)

    def data_key(self, ring: Ring, store_id: str) -> bytes:
        """The unwrapped data key. Raises SealBroken if this isn't a row that was made in this store for this user."""
        bound = _bound(self.user, self.born_after, self.ring_version)
        return sealing.unseal(ring.key(self.ring_version), self.wrapped, _PURPOSE, store_id.encode(), bound)

    def dump(self) -> bytes:
        """96 bytes."""
        return _bound(self.user, self.born_after, self.ring_version) + self.wrapped

    def is_dead(self, erased_version: str | None) -> bool:
        """Whether the user was erased, at `erased_version` for the last time, after this key was made."""
        return erased_version is not None and self.born_after < version_bytes(erased_version)


class KeyShard:
    """A whole shard in memory. rows: uint8 [users, 96] ascending."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows
        self._keys = as_words(rows[:, :KEY_BYTES]) if len(rows) else np.empty(0, f"V{KEY_BYTES}")

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def decode(cls, data: bytes | None, name: str) -> KeyShard:
        """The shard in `data`, proven; an empty one for None. Raises CorruptObjectError naming `name`."""
        if data is None:
            return cls(np.empty((0, ROW_BYTES), np.uint8))
        layout = parse_header(data, name)
        users = layout.tensors[0].shape[0] if layout.tensors and layout.tensors[0].shape else 0
        body = data[layout.slice("rows")] if layout.tensors == _specs(users) else b""
        if layout.metadata != _metadata(body) or layout.tensors != _specs(users):
            raise CorruptObjectError(f"{name} doesn't hold data keys of format {FORMAT_VERSION}: restore it")
        rows = np.frombuffer(body, np.uint8).reshape(-1, ROW_BYTES)
        if not ascending(rows[:, :KEY_BYTES]):
            raise CorruptObjectError(f"{name} has keys that aren't ascending and unique: restore it")
        return cls(rows)

    def encode(self) -> bytes:
        """The file's bytes; equal rows give equal bytes."""
        body = self.rows.tobytes()
        return encode([(_specs(len(self.rows))[0], body)], _metadata(body))

    def row(self, user: bytes) -> KeyRow | None:
        """The user's row, if there is one."""
        place = self._place(user)
        return None if place is None else KeyRow.parse(self.rows[place].tobytes())

    def with_rows(self, new: list[KeyRow]) -> KeyShard:
        """The shard with these rows added, each in the place of an older one of its user."""
        fresh = np.frombuffer(b"".join(row.dump() for row in new), np.uint8).reshape(-1, ROW_BYTES)
        kept = self.rows[~np.isin(self._keys, as_words(fresh[:, :KEY_BYTES]))] if len(self.rows) else self.rows
        both = np.concatenate([kept, fresh])
        return KeyShard(both[np.lexsort(both[:, KEY_BYTES - 1 :: -1].T)])

    def without(self, user: bytes) -> KeyShard:
        """The shard without the user's row."""
        place = self._place(user)
        return self if place is None else KeyShard(np.delete(self.rows, place, axis=0))

    def _place(self, user: bytes) -> int | None:
        place = int(np.searchsorted(self._keys, np.frombuffer(user, f"V{KEY_BYTES}"))[0])
        return place if place < len(self.rows) and self.rows[place, :KEY_BYTES].tobytes() == user else None


def expected_range(user: bytes, size: int) -> tuple[int, int] | None:
    """The bytes of a shard of `size` bytes among which the user's row nearly always is; None: read it whole.

    User keys are uniform, so of n rows the place of one at the fraction f of the shard's range has the mean n f and the variance
    n f (1 - f). A shard whose size is out of date only makes it a little less sure.
    """
    if size <= WHOLE_BYTES:
        return None
    rows = size // ROW_BYTES
    fraction = int.from_bytes(user[1:9], "big") / 2.0**64
    slack = SLACK_SIGMAS * math.sqrt(rows * fraction * (1 - fraction)) + 4
    start = size - (rows - (rows * fraction - slack)) * ROW_BYTES
    stop = start + (2 * slack + 2) * ROW_BYTES
    return max(0, int(start)), min(size, int(stop))


def find_row(user: bytes, part: bytes) -> KeyRow | None:
    """The user's row in some of a shard's bytes, wherever rows begin in them; None if it isn't there as a whole."""
    at = part.find(user)
    return KeyRow.parse(part[at : at + ROW_BYTES]) if at >= 0 and at + ROW_BYTES <= len(part) else None


def version_bytes(version: str | None) -> bytes:
    """An adapter's or erasure's version as 16 bytes that sort as it does; zeros for None."""
    return NEVER if version is None else int(version[:20]).to_bytes(VERSION_BYTES - 4, "big") + bytes.fromhex(version[21:])


def _bound(user: bytes, born_after: bytes, ring_version: int) -> bytes:
    return user + born_after + ring_version.to_bytes(4, "big")


def _specs(users: int) -> tuple[TensorSpec, ...]:
    return (TensorSpec("rows", "U8", (users, ROW_BYTES)),)


def _metadata(body: bytes) -> dict[str, str]:
    return {"format_version": FORMAT_VERSION, "checksum": hashlib.blake2b(body, digest_size=16).hexdigest()}
