"""Users' adapters in memory: bounded in bytes, one load a user however many requests ask, short memory of unknown users.

One cache belongs to one generation, so an adapter of another can't be served from it. An adapter that a batch holds lives as
long as the batch, whatever is evicted meanwhile. Knows what lies below as a plain function; knows no model and no HTTP.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

from cachetools import LRUCache

from plora_ray.errors import CorruptObjectError, StoreError
from plora_ray.inference.batcher import EngineClosed
from plora_ray.inference.observer import EngineObserver, PopulationReason
from plora_ray.store import UserAdapter

Pull = Callable[[bytes, str], UserAdapter | None]  # of a user's key and the version token that must be seen, "" for none

PULL_THREADS = 16
ENTRY_OVERHEAD_BYTES = 512  # key, dates and containers of one entry, measured with sys.getsizeof and rounded up


@dataclass(frozen=True)
class Entry:
    """What is known of one user. adapter None: none in the store; failure: why the store couldn't tell.

    loaded_s: monotonic time. confirmed: the newest version token for which the store was asked again.
    """

    adapter: UserAdapter | None
    loaded_s: float
    failure: PopulationReason | None = None
    confirmed: str = ""

    @property
    def bytes(self) -> int:
        return entry_bytes(0 if self.adapter is None else self.adapter.record.nbytes)


def entry_bytes(record_bytes: int) -> int:
    """What an entry with a record of so many bytes counts in the budget."""
    return ENTRY_OVERHEAD_BYTES + record_bytes


class AdapterCache:
    """Least recently used entries up to `budget_bytes`; a known user's entry is read again after `max_age_s`, an unknown
    user's after `unknown_ttl_s`. Threads may share it.

    pinned: users whose entries are never evicted; `pinned_bytes` of the budget are theirs. wait_s: how long a request waits for
    the store at most; then the entry that is here answers, however old, or none.
    """

    def __init__(
        self,
        pull: Pull,
        *,
        budget_bytes: int,
        max_age_s: float,
        unknown_ttl_s: float,
        wait_s: float = 5.0,
        pinned: Iterable[bytes] = (),
        pinned_bytes: int = 0,
        observer: EngineObserver | None = None,
    ) -> None:
        self._pull = pull
        self._max_age_s, self._unknown_ttl_s, self._wait_s = max_age_s, unknown_ttl_s, wait_s
        self._observer = observer or EngineObserver()
        self._pins = frozenset(pinned)
        self._pinned: dict[bytes, Entry] = {}
        self._entries: LRUCache[bytes, Entry] = LRUCache(max(0, budget_bytes - pinned_bytes), getsizeof=lambda entry: entry.bytes)
        self._loading: dict[bytes, Future[Entry]] = {}
        self._lock = threading.RLock()  # a load that is done already calls back at once, in the thread that asked
        self._threads = ThreadPoolExecutor(PULL_THREADS, thread_name_prefix="adapter-pull")

    def get_many(self, keys: Sequence[bytes], at_least: str = "") -> dict[bytes, Entry]:
        """An entry for every key; what isn't in memory is pulled, all at once.

        at_least: a version token; entries that haven't been compared with the store since it was drawn are read again.
        Raises EngineClosed after `close`.
        """
        found = {key: self._entry_or_load(key, at_least) for key in dict.fromkeys(keys)}
        here = {key: entry for key, entry in found.items() if isinstance(entry, Entry)}
        known = sum(entry.adapter is not None for entry in here.values())
        self._observer.on_lookups("memory", known)
        self._observer.on_lookups("unknown", len(here) - known)
        deadline = time.monotonic() + self._wait_s
        return here | {key: self._wait(key, load, deadline) for key, load in found.items() if isinstance(load, Future)}

    def put(self, adapter: UserAdapter) -> None:
        """Take in an adapter that was just fitted, unless a newer one is here."""
        with self._lock:
            self._loading.pop(adapter.key, None)  # what is being read may be older
            standing = self._standing(adapter.key)
            if standing is None or standing.adapter is None or standing.adapter.version < adapter.version:
                self._keep(adapter.key, Entry(adapter, time.monotonic(), confirmed=adapter.version))

    def reload(self, keys: Iterable[bytes]) -> list[Future[Entry]]:
        """Read these users' adapters again while what is here goes on answering. Raises EngineClosed."""
        with self._lock:
            return [self._start(key, "") for key in keys]

    def evict(self, keys: Iterable[bytes]) -> None:
        """Forget these users; a load in progress is not kept either."""
        with self._lock:
            for key in keys:
                self._entries.pop(key, None)
                self._pinned.pop(key, None)
                self._loading.pop(key, None)

    def close(self) -> None:
        """Stop pulling."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _entry_or_load(self, key: bytes, at_least: str) -> Entry | Future[Entry]:
        with self._lock:
            entry = self._standing(key)
            if entry is not None and self._is_good(entry, at_least):
                return entry
            loading = self._loading.get(key)
            return loading if loading is not None and not at_least else self._start(key, at_least)

    def _start(self, key: bytes, at_least: str) -> Future[Entry]:
        try:
            loading = self._loading[key] = self._threads.submit(self._load, key, at_least)
        except RuntimeError:  # the pool is shut down
            raise EngineClosed("this engine was replaced") from None
        loading.add_done_callback(lambda done: self._loaded(key, done))
        return loading

    def _wait(self, key: bytes, load: Future[Entry], deadline: float) -> Entry:
        try:
            return load.result(max(0.0, deadline - time.monotonic()))
        except CancelledError:
            raise EngineClosed("this engine was replaced") from None
        except TimeoutError:
            return self._without_store(key)

    def _is_good(self, entry: Entry, at_least: str) -> bool:
        held = entry.adapter.version if entry.adapter else ""
        if at_least and held < at_least and entry.confirmed < at_least:
            return False
        return time.monotonic() - entry.loaded_s < (self._max_age_s if entry.adapter else self._unknown_ttl_s)

    def _load(self, key: bytes, at_least: str) -> Entry:
        try:
            return Entry(self._pull(key, at_least), time.monotonic(), confirmed=at_least)
        except CorruptObjectError:
            return Entry(None, time.monotonic(), failure="adapter_corrupt")
        except StoreError:
            return self._without_store(key)

    def _without_store(self, key: bytes) -> Entry:
        """What is known of the user while the store doesn't answer; it is asked again a little later, not by every request."""
        with self._lock:
            standing = self._standing(key)
            if standing is None or standing.adapter is None:
                return Entry(None, time.monotonic(), failure="store_unavailable")
            later = replace(standing, loaded_s=max(standing.loaded_s, time.monotonic() - self._max_age_s + self._unknown_ttl_s))
            self._keep(key, later)  # rather a little old than not personal
            return later

    def _loaded(self, key: bytes, done: Future[Entry]) -> None:
        with self._lock:
            if self._loading.get(key) is not done:
                return  # evicted meanwhile: what was read may be older than the reason for it
            del self._loading[key]
            if done.cancelled() or done.exception() is not None:
                return
            entry = done.result()
            if entry.failure is None:
                self._keep(key, entry)
            elif entry.failure == "adapter_corrupt":  # an older adapter isn't what the user has
                self._entries.pop(key, None)
                self._pinned.pop(key, None)

    def _standing(self, key: bytes) -> Entry | None:
        return self._pinned.get(key) or self._entries.get(key)

    def _keep(self, key: bytes, entry: Entry) -> None:
        if key in self._pins and entry.adapter is not None:
            self._pinned[key] = entry
            return
        self._pinned.pop(key, None)
        if entry.bytes <= self._entries.maxsize:
            self._entries[key] = entry
