"""Which adapter serves a user: what has to be read to tell, and what the answers say.

    1. the fresh adapter, if it was fitted with the generation's shared weights and is newer than its record and the user's erasure
    2. the generation's record, unless the user was ever erased
    3. none: the population answers

Everything is read at the same time. Knows one user at a time; does no reading of its own but where an answer proves to be out of date.
"""

from __future__ import annotations

from dataclasses import dataclass

from plora_ray.errors import CorruptObjectError
from plora_ray.store import names
from plora_ray.store.adapters import UserAdapter
from plora_ray.store.encryption.records import UnreadableRecord
from plora_ray.store.encryption.user_keys import UserKeys
from plora_ray.store.fresh import FreshAdapters, latest
from plora_ray.store.objects import ObjectRange, ObjectStore
from plora_ray.store.reader import GenerationReader
from plora_ray.store.record_cache import RecordCache
from plora_ray.store.tombstones import tombstone_version


@dataclass(frozen=True)
class PullPlan:
    """position: of the user in the generation, if it has the user. near: the record's stored bytes, if they are at hand already.

    ranges: what to read: the fresh object if `may_be_fresh`, the record if it isn't near, the part of a key shard in an encrypted store.
    """

    key: bytes
    position: int | None
    near: bytes | None
    may_be_fresh: bool
    ranges: list[ObjectRange]


class Puller:
    """Pulls single users' adapters of one store. keys: None for a store without encryption."""

    def __init__(self, objects: ObjectStore, fresh: FreshAdapters, keys: UserKeys | None) -> None:
        self._objects, self._fresh, self._keys = objects, fresh, keys

    def plan(self, reader: GenerationReader, key: bytes, nearer: RecordCache | None, may_be_fresh: bool) -> PullPlan:
        """What has to be read for this user. nearer: where the generation's record is looked for first."""
        position = reader.lookup(key)
        near = nearer.get(key) if nearer is not None and position is not None else None
        ranges = [ObjectRange(names.fresh(key))] if may_be_fresh else []
        if position is not None and near is None:
            ranges.append(reader.record_range(position))
        if self._keys is not None and (may_be_fresh or position is not None):
            ranges.append(self._keys.range_of(key))
        return PullPlan(key, position, near, may_be_fresh, ranges)

    def settle(
        self, reader: GenerationReader, plan: PullPlan, found: list[bytes | None], nearer: RecordCache | None
    ) -> UserAdapter | None:
        """The adapter that serves, from what was found at the plan's ranges. Raises CorruptObjectError."""
        answers, key = list(found), plan.key
        key_part = answers.pop() if self._keys is not None and plan.ranges else None
        standing = self._fresh.standing(key, answers.pop(0)) if plan.may_be_fresh else None
        erased = latest(reader.erased_version(key), standing.erased_version if standing else None)
        outdated = max(erased or "", reader.manifest.version if plan.position is not None else "")
        fresh = standing.adapter if standing else None
        if fresh and fresh.basis == reader.basis and fresh.version > outdated:
            return self._fresh.opened(fresh, key_part)
        if plan.position is None or erased is not None:
            return None
        try:
            return self._recorded(reader, plan.position, plan.near, answers, key_part, nearer)
        except UnreadableRecord:
            if tombstone_version(self._objects, key) is None:
                raise
            return None  # erased just now, and the data key with it
        except CorruptObjectError:
            if plan.near is None or nearer is None:
                raise
            nearer.drop(key)  # only the near copy is damaged
            again = self.plan(reader, key, nearer, plan.may_be_fresh)
            return self.settle(reader, again, self._objects.read_ranges(again.ranges), nearer)

    @staticmethod
    def _recorded(
        reader: GenerationReader, position: int, near: bytes | None, answers: list[bytes | None], key_part: bytes | None,
        nearer: RecordCache | None,
    ) -> UserAdapter:  # fmt: skip
        """The generation's own adapter, from the near copy or from what was read; what was read is kept near."""
        stored = near if near is not None else answers[0]
        adapter = reader.adapter_at(position, stored, key_part)
        if near is None and nearer is not None and stored is not None:
            nearer.put(adapter.key, stored)
        return adapter
