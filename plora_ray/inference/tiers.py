"""Where a row's adapter comes from: all records in memory, or recently used ones, a local disk, the store.

    resident    every record of the generation as one array, if that fits the budget: no trained user is ever cold
    memory      fresh adapters, and without the array whatever was used lately
    disk        the generation's records as stored, for adapters too large to keep in memory
    store       a ranged read of the record and, at the same time, of the fresh adapter

With the array or the disk a listing of the fresh adapters, in the background, says who needs a request at all. Erasures and
newer adapters win over every tier. Knows the store and keys; knows no model and no HTTP.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import wait
from dataclasses import dataclass
from itertools import islice
from typing import Literal, NamedTuple

import numpy as np

from plora_ray.errors import ConfigError, CorruptObjectError, StoreError
from plora_ray.inference.batcher import EngineClosed
from plora_ray.inference.cache import AdapterCache, entry_bytes
from plora_ray.inference.disk_tier import DiskRecords, DiskTier
from plora_ray.inference.fresh_index import FreshIndex
from plora_ray.inference.observer import EngineObserver, PopulationReason
from plora_ray.inference.resident import ResidentRecords
from plora_ray.store import AdapterStore, GenerationReader, UserAdapter

log = logging.getLogger(__name__)

LOADED_AT_ONCE = 64  # in the background: a request's own load waits behind no more than these
COMPLAINTS_KEPT = 1000
LEAST_MEMORY_BYTES = 4 * 2**20  # for fresh adapters, where the array leaves less of the budget


class Found(NamedTuple):
    """A row's record [width], None for the population; failure: why none, if the store couldn't tell."""

    record: np.ndarray | None
    failure: PopulationReason | None = None


@dataclass(frozen=True)
class CacheOptions:
    """What a process may keep of users' adapters.

    budget_bytes: memory. resident: whether all records are kept there; auto: if they fit. disk: the local disk's tier, if any.
    max_age_s, unknown_ttl_s, wait_s: see AdapterCache. pinned: users who are loaded at once and never evicted; prefetched: users
    who are loaded at once, as many as fit. Both say nothing where all records are resident.
    """

    budget_bytes: int = 256 * 2**20
    resident: Literal["auto", "on", "off"] = "off"
    max_age_s: float = 30.0
    unknown_ttl_s: float = 2.0
    wait_s: float = 5.0
    disk: DiskTier | None = None
    pinned: Sequence[bytes] = ()
    prefetched: Sequence[bytes] = ()


class TieredAdapters:
    """The adapters of one open generation. Threads may share it.

    Raises ConfigError for what doesn't fit the budget, StoreError if the store can't be read at the start.
    """

    def __init__(self, store: AdapterStore, reader: GenerationReader, options: CacheOptions, observer: EngineObserver) -> None:
        self._store, self._reader, self._observer, self._disk = store, reader, observer, options.disk
        self._complaints: set[str] = set()
        self._unread: set[bytes] = set()  # users whose fresh object is known and couldn't be read
        self._stop = threading.Event()
        record_bytes = reader.manifest.width * 4
        resident_bytes = self._resident_bytes(options)
        pinned = options.pinned if not resident_bytes else ()
        pinned_bytes = len(pinned) * entry_bytes(record_bytes)
        if pinned_bytes > options.budget_bytes:
            raise ConfigError(
                f"serving.pin_users_file names {len(pinned):,} users, whose adapters take {pinned_bytes:,} bytes, but "
                f"serving.cache_bytes is {options.budget_bytes:,}: raise it or name fewer"
            )
        follows = resident_bytes > 0 or options.disk is not None
        memory_bytes = max(options.budget_bytes - resident_bytes, LEAST_MEMORY_BYTES) if resident_bytes else options.budget_bytes
        self._index = FreshIndex(store.fresh_tags) if follows else None
        self._memory = AdapterCache(
            self._pull, budget_bytes=memory_bytes, unknown_ttl_s=options.unknown_ttl_s, wait_s=options.wait_s,
            max_age_s=float("inf") if follows else options.max_age_s,  # with the index what is here is known to be new
            pinned=pinned, pinned_bytes=pinned_bytes, observer=observer,
        )  # fmt: skip
        self._fitting = (memory_bytes - pinned_bytes) // entry_bytes(record_bytes)
        if options.disk is not None:
            options.disk.erase(store.tombstones())  # those who were erased while nobody was looking
        if self._index is not None:
            changed = self._index.refresh()  # before the records: what is stored from now on is seen by the next listing
            period_s = options.max_age_s / 2
            self._thread = threading.Thread(target=self._follow, args=(self._index, changed, period_s), name="fresh-adapters", daemon=True)
        self._resident = ResidentRecords(reader) if resident_bytes else None
        if self._resident is not None:
            self._resident.forget(store.tombstones())
            observer.on_resident(self._resident.users)
        else:
            self._load([*pinned, *islice(options.prefetched, self._fitting)])
        if self._index is not None:
            self._thread.start()

    def find(self, keys: Sequence[bytes], at_least: str = "") -> list[Found]:
        """What serves each of `keys`, in order. at_least: version token that must have been seen. Raises EngineClosed."""
        resident, index = self._resident, self._index
        if resident is None or index is None:
            entries = self._memory.get_many(keys, at_least)
            return [Found(None if (one := entries[key]).adapter is None else one.adapter.record, one.failure) for key in keys]
        rows = resident.rows(keys)
        asked = [key for key, row in zip(keys, rows, strict=True) if at_least or row is None or index.may_serve(key)]
        self._observer.on_lookups("resident", len(keys) - len(asked))
        entries = self._memory.get_many(asked, at_least) if asked else {}
        found = []
        for key, row in zip(keys, rows, strict=True):
            entry = entries.get(key)
            if entry is None or (entry.failure == "store_unavailable" and row is not None):  # rather a little old than not personal
                found.append(Found(row))
            else:
                found.append(Found(None if entry.adapter is None else entry.adapter.record, entry.failure))
        return found

    def put(self, adapter: UserAdapter) -> None:
        """Serve an adapter that was just fitted, unless a newer one is here."""
        if self._index is not None:
            self._index.note(adapter.key)
        self._memory.put(adapter)

    def evict(self, keys: Iterable[bytes]) -> None:
        """Forget users who were erased, in every tier of this process."""
        gone = list(keys)
        self._memory.evict(gone)
        if self._resident is not None:
            self._resident.forget(gone)
        if self._disk is not None:
            self._disk.erase(gone)

    def close(self) -> None:
        """Stop reading."""
        self._stop.set()
        self._memory.close()

    def _resident_bytes(self, options: CacheOptions) -> int:
        """Memory for all records; 0 if they aren't to be resident."""
        needed = ResidentRecords.bytes_of(self._reader)
        if options.resident == "on" and needed > options.budget_bytes:
            raise ConfigError(
                f"serving.resident is on, but the records of generation {self._reader.generation} take {needed:,} bytes and "
                f"serving.cache_bytes is {options.budget_bytes:,}: raise it or set serving.resident to auto"
            )
        return needed if options.resident != "off" and needed <= options.budget_bytes else 0

    def _pull(self, key: bytes, at_least: str) -> UserAdapter | None:
        """The user's adapter from below memory."""
        began, index = time.monotonic(), self._index
        tag = index.tag(key) if index is not None else None
        may_be_fresh = index is None or bool(at_least) or self._reader.lookup(key) is None or index.may_serve(key)
        near = DiskRecords(self._disk, self._reader.generation) if self._disk is not None else None
        try:
            adapter = self._store.pull(self._reader, key, records=near, may_be_fresh=may_be_fresh)
        except StoreError as error:
            if tag is not None:
                self._unread.add(key)
            if isinstance(error, CorruptObjectError):
                self._complain(str(error))
            raise
        if near is not None and self._reader.erased_version(key) is not None:
            near.drop(key)  # erased while it was read
        if index is not None and adapter is not None and adapter.source == "fresh":
            index.note(key)
        elif index is not None and tag is not None and self._reader.lookup(key) is not None:
            index.settle(key, tag)
        self._observer.on_pull(time.monotonic() - began)
        self._observer.on_lookups("none" if adapter is None else "disk" if near is not None and near.hit else "store", 1)
        return adapter

    def _load(self, keys: Iterable[bytes]) -> None:
        """Read these users' adapters into memory, a few at a time. Raises EngineClosed."""
        left = iter(keys)
        while some := list(islice(left, LOADED_AT_ONCE)):
            wait(self._memory.reload(some))

    def _follow(self, index: FreshIndex, changed: list[bytes], period_s: float) -> None:
        """Keep what is in memory as new as the last listing, until closed."""
        while True:
            try:
                self._memory.evict(changed[self._fitting :])  # what doesn't fit is read when it is asked for
                self._load(changed[: self._fitting])
            except EngineClosed:
                return
            if self._stop.wait(period_s):
                return
            try:
                changed = index.refresh()
                again, self._unread = self._unread, set()
                changed += again
            except StoreError as error:  # what is here goes on serving
                changed = []
                self._complain(str(error))

    def _complain(self, what: str) -> None:
        """Log it once."""
        if what not in self._complaints and len(self._complaints) < COMPLAINTS_KEPT:
            self._complaints.add(what)
            log.warning("generation %s: %s", self._reader.generation, what)
