"""Which users a process has served, noted in memory and written down now and then; never a write a request.

Knows keys; knows nothing of what was asked or answered.
"""

from __future__ import annotations

import datetime
import logging
import threading
from collections.abc import Iterable

from plora_ray.errors import StoreError
from plora_ray.store.objects import ObjectStore
from plora_ray.store.uses import begin_uses, today, write_uses

log = logging.getLogger(__name__)

WRITE_S = 3600.0  # what a killed process loses at most
MAX_KEYS = 200_000  # noted at once, about 20 MB; more are written down at once


class UseRecorder:
    """Notes users, and writes those of each hour as one object below used/. Threads may share it.

    A write that fails is made up for by the next; beyond `max_keys` notes that can't be written, new ones are let go.
    """

    def __init__(self, objects: ObjectStore, *, write_s: float = WRITE_S, max_keys: int = MAX_KEYS) -> None:
        self._objects, self._max_keys = objects, max_keys
        self._noted: dict[datetime.date, set[bytes]] = {}
        self._lock = threading.Lock()
        self._full, self._over = threading.Event(), False
        self._begun = False
        self._thread = threading.Thread(target=self._write_on, args=(write_s,), name="use-recorder", daemon=True)
        self._thread.start()

    def note(self, keys: Iterable[bytes]) -> None:
        """These users are used today. Never waits for the store."""
        with self._lock:
            if sum(map(len, self._noted.values())) >= self._max_keys:
                self._full.set()
                return
            self._noted.setdefault(today(), set()).update(keys)

    def write(self) -> None:
        """Write down what is noted. Raises StoreError, with nothing forgotten."""
        with self._lock:
            noted, self._noted = self._noted, {}
        try:
            if not self._begun:
                begin_uses(self._objects)
                self._begun = True
            for day in sorted(noted):
                write_uses(self._objects, noted[day], day)
                noted[day] = set()
        except StoreError:
            with self._lock:
                for day, keys in noted.items():
                    self._noted.setdefault(day, set()).update(keys)
            raise

    def close(self) -> None:
        """Write what is noted, then stop."""
        self._over = True
        self._full.set()
        self._thread.join()

    def _write_on(self, write_s: float) -> None:
        while not self._over:
            self._full.wait(write_s)
            self._full.clear()
            try:
                self.write()
            except StoreError as error:
                log.warning("who was served isn't written down yet: %s", error)
