"""Which users have a fresh adapter in the store, learnt by one listing now and then instead of a request a user.

With it a trained user without a fresh adapter needs no request at all, and what was adapted elsewhere is seen in bounded time.
Takes memory by the number of fresh objects (about 200 bytes each); a new generation takes them in. Knows keys and tags only.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

Listing = Callable[[], dict[bytes, str]]  # every user with a fresh object, and a tag that changes when it is replaced


class FreshIndex:
    """Fresh objects as of the last `refresh`, and those of this process since. Threads may share it."""

    def __init__(self, listing: Listing) -> None:
        self._listing = listing
        self._lock = threading.Lock()
        self._tags: dict[bytes, str] = {}
        self._settled: dict[bytes, str] = {}  # objects that were read and don't serve: the generation's record is newer
        self._noted: set[bytes] = set()

    def refresh(self) -> list[bytes]:
        """List again. The users whose fresh object is new, replaced or gone since. Raises StoreError."""
        with self._lock:
            self._noted.clear()
        tags = self._listing()
        with self._lock:
            changed = [key for key, tag in tags.items() if self._tags.get(key) != tag]
            changed += [key for key in self._tags if key not in tags and key not in self._noted]
            self._tags = tags | {key: self._tags[key] for key in self._noted if key not in tags}
            self._settled = {key: tag for key, tag in self._settled.items() if tags.get(key) == tag}
            return changed

    def may_serve(self, key: bytes) -> bool:
        """Whether the user's fresh object, if there is one, may be newer than the generation's record."""
        tag = self._tags.get(key)
        return tag is not None and self._settled.get(key) != tag

    def tag(self, key: bytes) -> str | None:
        """The user's fresh object as it is known now; None if there is none."""
        return self._tags.get(key)

    def note(self, key: bytes) -> None:
        """This process has just learnt of the user's fresh adapter, whatever a listing that is under way says."""
        with self._lock:
            self._noted.add(key)
            self._tags.setdefault(key, "")
            self._settled.pop(key, None)

    def settle(self, key: bytes, tag: str) -> None:
        """The user's fresh object was read when it had this tag or later, and the generation's record is newer."""
        with self._lock:
            self._settled[key] = tag
