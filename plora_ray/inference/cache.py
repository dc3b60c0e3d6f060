"""User vectors in memory: bounded in bytes, one load a user however many requests ask, short memory of unknown users.

One cache belongs to one generation, so an adapter of another can't be served from it. Knows the store's `pull` as a
plain function; knows no model and no HTTP.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass

from cachetools import LRUCache

from plora_ray.errors import CorruptObjectError, StoreError
from plora_ray.inference.batcher import EngineClosed
from plora_ray.store import UserAdapter

Pull = Callable[[bytes], UserAdapter | None]

PULL_THREADS = 16
ENTRY_OVERHEAD_BYTES = 512  # key, dates and containers of one entry, measured with sys.getsizeof and rounded up


@dataclass(frozen=True)
class Entry:
    """What is known of one user. adapter None: none in the store; failure: why the store couldn't tell.

    loaded_s: monotonic time. confirmed: the newest version token for which the store was asked again.
    """

    adapter: UserAdapter | None
    loaded_s: float
    failure: str | None = None
    confirmed: str = ""

    @property
    def bytes(self) -> int:
        return ENTRY_OVERHEAD_BYTES + (0 if self.adapter is None else self.adapter.record.nbytes)


class AdapterCache:
    """Least recently used entries up to `budget_bytes`; a known user's entry is read again after `max_age_s`, an unknown
    user's after `unknown_ttl_s`. Threads may share it."""

    def __init__(self, pull: Pull, *, budget_bytes: int, max_age_s: float, unknown_ttl_s: float) -> None:
        self._pull = pull
        self._max_age_s, self._unknown_ttl_s = max_age_s, unknown_ttl_s
        self._entries: LRUCache[bytes, Entry] = LRUCache(budget_bytes, getsizeof=lambda entry: entry.bytes)
        self._loading: dict[bytes, Future[Entry]] = {}
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(PULL_THREADS, thread_name_prefix="adapter-pull")

    def get_many(self, keys: Sequence[bytes], at_least: str = "") -> dict[bytes, Entry]:
        """An entry for every key; what isn't in memory is pulled, all at once.

        at_least: a version token; entries that haven't been compared with the store since it was drawn are read again.
        Raises EngineClosed after `close`.
        """
        waiting = {key: self._entry_or_load(key, at_least) for key in dict.fromkeys(keys)}
        try:
            return {key: found.result() if isinstance(found, Future) else found for key, found in waiting.items()}
        except CancelledError:
            raise EngineClosed("this engine was replaced") from None

    def put(self, adapter: UserAdapter) -> None:
        """Take in an adapter that was just fitted, unless a newer one is here."""
        with self._lock:
            self._loading.pop(adapter.key, None)  # what is being read may be older
            standing = self._entries.get(adapter.key)
            if standing is None or standing.adapter is None or standing.adapter.version < adapter.version:
                self._keep(adapter.key, Entry(adapter, time.monotonic(), confirmed=adapter.version))

    def evict(self, keys: Iterable[bytes]) -> None:
        """Forget these users; a load in progress is not kept either."""
        with self._lock:
            for key in keys:
                self._entries.pop(key, None)
                self._loading.pop(key, None)

    def close(self) -> None:
        """Stop pulling."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _entry_or_load(self, key: bytes, at_least: str) -> Entry | Future[Entry]:
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and self._is_good(entry, at_least):
                return entry
            loading = self._loading.get(key)
            if loading is not None and not at_least:
                return loading
            try:
                loading = self._loading[key] = self._threads.submit(self._load, key, at_least)
            except RuntimeError:  # the pool is shut down
                raise EngineClosed("this engine was replaced") from None
        # Outside the lock: a load that is done already calls back at once, and the call takes the lock.
        loading.add_done_callback(lambda done: self._loaded(key, done))
        return loading

    def _is_good(self, entry: Entry, at_least: str) -> bool:
        held = entry.adapter.version if entry.adapter else ""
        if at_least and held < at_least and entry.confirmed < at_least:
            return False
        return time.monotonic() - entry.loaded_s < (self._max_age_s if entry.adapter else self._unknown_ttl_s)

    def _load(self, key: bytes, at_least: str) -> Entry:
        try:
            return Entry(self._pull(key), time.monotonic(), confirmed=at_least)
        except CorruptObjectError:
            return Entry(None, time.monotonic(), failure="adapter_corrupt")
        except StoreError:
            with self._lock:
                standing = self._entries.get(key)
            if standing is not None and standing.adapter is not None:
                return standing  # rather a little old than not personal
            return Entry(None, time.monotonic(), failure="store_unavailable")

    def _loaded(self, key: bytes, done: Future[Entry]) -> None:
        with self._lock:
            if self._loading.get(key) is not done:
                return  # evicted meanwhile: what was read may be older than the reason for it
            del self._loading[key]
            if not done.cancelled() and done.exception() is None and done.result().failure is None:
                self._keep(key, done.result())

    def _keep(self, key: bytes, entry: Entry) -> None:
        if entry.bytes <= self._entries.maxsize:
            self._entries[key] = entry
