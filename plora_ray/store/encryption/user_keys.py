"""The users' data keys: found, made and destroyed in the key shards below keys/.

A shard is compared and replaced, so writers of several processes lose nothing to each other. Erasing comes before making: a key is
made after its user's tombstone was looked for in the very round that writes it, and a key born before an erasure is dead.
Keeps no data key in memory longer than a call. Knows nothing of what is sealed.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from plora_ray.errors import CorruptObjectError, StoreError
from plora_ray.store import names
from plora_ray.store.encryption.ring import Ring, make_ring, open_ring
from plora_ray.store.encryption.root_key import RootKeySource
from plora_ray.store.encryption.sealing import SealBroken, new_key
from plora_ray.store.encryption.shards import KeyRow, KeyShard, expected_range, find_row, version_bytes
from plora_ray.store.objects import ObjectRange, ObjectStore
from plora_ray.store.tombstones import tombstone_version

Groups = dict[int, list[bytes]]


class UserKeys:
    """The data keys of an encrypted store. Threads may share it; a copy in another process reads the root key anew, there.

    source: of the root key; None: keys can be counted and destroyed, but none can be read or made.
    """

    def __init__(self, objects: ObjectStore, store_id: str, source: RootKeySource | None) -> None:
        self.store_id = store_id
        self._objects, self._source = objects, source
        self._ring: Ring | None = None
        self._opening = threading.Lock()
        self._sizes: dict[int, int] = {}  # of shards when last seen; out of date is fine

    def __reduce__(self) -> tuple[type[UserKeys], tuple[ObjectStore, str, RootKeySource | None]]:
        return UserKeys, (self._objects, self.store_id, self._source)

    @property
    def locked(self) -> bool:
        """Whether there is no root key."""
        return self._source is None

    @property
    def newest(self) -> int:
        """The version of the ring's key that wraps new data keys."""
        return self._opened(None).newest

    def open(self, *, create: bool) -> None:
        """Unwrap the ring, made if it is missing and `create`. Raises StoreError if the root key is missing or another one."""
        if self._source is not None and create:
            make_ring(self._objects, self.store_id, self._source)
        self._opened(None)

    def look_around(self) -> None:
        """Learn the shards' sizes, by one listing, so that one ranged read finds a row."""
        listed = {names.key_shard_byte(item.path): item.size for item in self._objects.list(names.KEYS)}
        self._sizes = {byte: size for byte, size in listed.items() if byte is not None}

    # One user

    def range_of(self, user: bytes) -> ObjectRange:
        """What to read along with the user's record: the row is nearly always in it."""
        found = expected_range(user, self._sizes.get(user[0], 0))
        return ObjectRange(names.key_shard(user[0]), *(found or (None, None)))

    def in_part(self, user: bytes, part: bytes | None) -> bytes | None:
        """The user's data key from the answer to `range_of`, or from the whole shard; None if the user has none."""
        row = find_row(user, part) if part is not None else None
        return self._unwrapped(row) if row is not None else self.get(user)

    def get(self, user: bytes) -> bytes | None:
        """The user's data key as it stands now, from the whole shard; None if the user has none."""
        row = self._shard(user[0]).row(user)
        return None if row is None else self._unwrapped(row)

    def has(self, user: bytes) -> bool:
        """Whether there is a data key that was made since the user's last erasure."""
        row = self._shard(user[0]).row(user)
        return row is not None and not row.is_dead(tombstone_version(self._objects, user))

    def for_adapter(self, user: bytes, admit: Callable[[str | None], None]) -> bytes:
        """The data key for an adapter of the user's own, made if it is missing or older than the user's last erasure.

        admit: is told the version of that erasure, and raises if the adapter must not be stored.
        """
        found = b""

        def kept(data: bytes | None) -> bytes | None:
            nonlocal found
            shard = self._decoded(user[0], data)
            erased, row = tombstone_version(self._objects, user), shard.row(user)
            admit(erased)
            if row is not None and not row.is_dead(erased):
                found = self._unwrapped(row)
                return None
            found = new_key()
            return shard.with_rows([KeyRow.make(user, version_bytes(erased), found, self._opened(None), self.store_id)]).encode()

        self._objects.update(names.key_shard(user[0]), kept)
        return found

    def destroy(self, user: bytes, version: str) -> None:
        """Destroy the user's data key, unless it was made after the erasure `version`. Needs no root key."""

        def emptied(data: bytes | None) -> bytes | None:
            shard = self._decoded(user[0], data)
            row = shard.row(user)
            return shard.without(user).encode() if row is not None and row.is_dead(version) else None

        self._objects.update(names.key_shard(user[0]), emptied)

    # Many users

    def get_many(self, users: Iterable[bytes]) -> dict[bytes, bytes]:
        """The data keys of those of `users` who have one. A shard is read whole if that is less than its users' ranges."""
        rows: dict[bytes, KeyRow] = {}
        whole: Groups = {}
        single: list[bytes] = []
        for byte, group in _by_shard(users).items():
            size = self._sizes.get(byte, 0)
            spans = [expected_range(user, size) for user in group]
            if sum(size if span is None else span[1] - span[0] for span in spans) < size:
                single += group
            else:
                whole[byte] = group
        for user, part in zip(single, self._objects.read_ranges([self.range_of(user) for user in single]), strict=True):
            row = find_row(user, part) if part is not None else None
            if row is not None:
                rows[user] = row
            else:
                whole.setdefault(user[0], []).append(user)
        answers = self._objects.read_many(names.key_shard(byte) for byte in whole)
        for byte, group in whole.items():
            shard = self._decoded(byte, answers.get(names.key_shard(byte)))
            rows |= {user: row for user in group if (row := shard.row(user)) is not None}
        return {user: self._unwrapped(row) for user, row in rows.items()}

    def for_records(self, users: Sequence[bytes]) -> list[bytes]:
        """Data keys for the records of a generation, in the order of `users`; missing ones are made, by one update a shard.

        An erased user's record gets a key that is kept nowhere, so that nobody can ever read it, even if the user came back.
        """
        found: dict[bytes, bytes] = {}
        changes = {names.key_shard(byte): partial(self._grown, byte, group, found) for byte, group in _by_shard(users).items()}
        self._objects.update_many(changes)
        erased = self._erased()
        return [new_key() if user in erased else found[user] for user in users]

    def _grown(self, byte: int, users: list[bytes], found: dict[bytes, bytes], data: bytes | None) -> bytes | None:
        """The shard with keys for those of `users` who have none and aren't erased; None if that is nobody. Fills `found`."""
        shard, made = self._decoded(byte, data), []
        rows = {user: shard.row(user) for user in users}
        erased = self._erased() if None in rows.values() else set()
        for user, row in rows.items():
            found[user] = new_key() if row is None else self._unwrapped(row)
            if row is None and user not in erased:
                made.append(KeyRow.make(user, version_bytes(None), found[user], self._opened(None), self.store_id))
        return shard.with_rows(made).encode() if made else None

    def rewrap(self, on_shards: Callable[[int, int], None]) -> None:
        """Wrap by the ring's newest key what an older one wraps, a shard at a time. on_shards: hears how many of how many are done."""
        shards = [byte for item in self._objects.list(names.KEYS) if (byte := names.key_shard_byte(item.path)) is not None]
        for done, byte in enumerate(shards, 1):
            self._objects.update(names.key_shard(byte), partial(self._rewrapped, byte))
            on_shards(done, len(shards))

    def _rewrapped(self, byte: int, data: bytes | None) -> bytes | None:
        shard, ring = self._decoded(byte, data), self._opened(None)
        old = [row for row in map(KeyRow.parse, map(bytes, shard.rows)) if row.ring_version != ring.newest]
        new = [KeyRow.make(row.user, row.born_after, self._unwrapped(row), ring, self.store_id) for row in old]
        return shard.with_rows(new).encode() if new else None

    def checked(self, path: str, data: bytes) -> list[bytes]:
        """The users of the shard at `path`. Raises CorruptObjectError unless it is whole and, given the root key, every key unwraps."""
        shard = KeyShard.decode(data, path)
        rows = [KeyRow.parse(bytes(row)) for row in shard.rows]
        if any(row.user[0] != names.key_shard_byte(path) for row in rows):
            raise CorruptObjectError("holds data keys of users who belong elsewhere: restore it")
        for row in rows if not self.locked else []:
            self._unwrapped(row)
        return [row.user for row in rows]

    def _erased(self) -> set[bytes]:
        """Users who have a tombstone now."""
        return {key for item in self._objects.list(names.ERASED) if (key := names.erased_key(item.path)) is not None}

    def _shard(self, byte: int) -> KeyShard:
        path = names.key_shard(byte)
        return self._decoded(byte, self._objects.read_many([path]).get(path))

    def _decoded(self, byte: int, data: bytes | None) -> KeyShard:
        self._sizes[byte] = len(data or b"")
        return KeyShard.decode(data, self._objects.uri_of(names.key_shard(byte)))

    def _unwrapped(self, row: KeyRow) -> bytes:
        try:
            return row.data_key(self._opened(row.ring_version), self.store_id)
        except SealBroken as error:
            shard = self._objects.uri_of(names.key_shard(row.user[0]))
            raise CorruptObjectError(f"{shard} holds a data key that isn't its user's: restore it") from error

    def _opened(self, version: int | None) -> Ring:
        """The ring, read anew if it lacks `version`: the root key may have been changed since, and its file with it."""
        with self._opening:
            if self._ring is None or (version is not None and version not in self._ring):
                if self._source is None:
                    raise StoreError(f"{self._objects.uri} is encrypted: set store.encryption to its root key")
                self._ring = open_ring(self._objects, self.store_id, self._source)
            if version is not None and version not in self._ring:
                raise CorruptObjectError(f"{self._objects.uri_of(names.KEY_RING)} lacks version {version} of its keys: restore it")
            return self._ring


def _by_shard(users: Iterable[bytes]) -> Groups:
    groups: Groups = defaultdict(list)
    for user in users:
        groups[user[0]].append(user)
    return groups
