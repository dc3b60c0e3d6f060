"""Stored bytes of users' records on a local disk: bounded, least recently used first out, still there after a restart.

A file holds a record exactly as a segment does, and whoever reads it proves it against the generation's digests, so a damaged
or exchanged file is only a miss. Nothing is decrypted on the way here: of an encrypted store the files are encrypted, too.
Knows files, generations' names and users' keys; knows nothing of records' meaning.

    {directory}/{generation}/{first two digits}/{key}.record
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

from plora_ray.errors import ConfigError

log = logging.getLogger(__name__)

_KEY_FILE = re.compile(r"([0-9a-f]{32})\.record")
_DRAFT = re.compile(r"\.[0-9a-f]{32}")
DRAFT_MAX_AGE_S = 60.0  # a write takes milliseconds: an older draft is of a process that was killed


class DiskTier:
    """Records up to `budget_bytes` below `directory`, for all generations that this process serves. Threads may share it.

    Files from before count, oldest use first. Replicas of one machine may share the directory: each bounds what it knows of.
    Raises ConfigError if the directory can't be used; later failures of the disk are misses, logged once.
    """

    def __init__(self, directory: Path, budget_bytes: int) -> None:
        self._directory, self._budget_bytes = directory, budget_bytes
        self._lock = threading.Lock()
        self._sizes: OrderedDict[tuple[str, bytes], int] = OrderedDict()  # least recently used first
        self._bytes = 0
        self._complained = False
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._find_files()
        except OSError as error:
            raise ConfigError(f"serving.disk_cache_dir {directory} can't be used: {error.strerror or error}") from error
        self._shrink()

    @property
    def nbytes(self) -> int:
        """Bytes of the files it knows of."""
        return self._bytes

    def get(self, generation: str, key: bytes) -> bytes | None:
        """The record as it was put, not yet proven; None if it isn't here."""
        with self._lock:
            if (generation, key) not in self._sizes:
                return None
            self._sizes.move_to_end((generation, key))
        path = self._path(generation, key)
        try:
            data = path.read_bytes()
            os.utime(path)  # the order of use is read from here after a restart
            return data
        except OSError:  # another replica has made room
            self._forget([(generation, key)])
            return None

    def put(self, generation: str, key: bytes, stored: bytes) -> None:
        """Keep the record's bytes; a file is there whole or not at all."""
        if len(stored) > self._budget_bytes:
            return
        path = self._path(generation, key)
        draft = path.with_name(f".{uuid.uuid4().hex}")
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            draft.write_bytes(stored)
            draft.replace(path)
        except OSError as error:
            draft.unlink(missing_ok=True)
            self._complain(error)
            return
        with self._lock:
            self._bytes += len(stored) - self._sizes.pop((generation, key), 0)
            self._sizes[generation, key] = len(stored)
        self._shrink()

    def drop(self, generation: str, key: bytes) -> None:
        """Delete one record's file."""
        self._forget([(generation, key)])

    def erase(self, keys: Iterable[bytes]) -> None:
        """Delete these users' files of every generation."""
        gone = set(keys)
        with self._lock:
            found = [entry for entry in self._sizes if entry[1] in gone]
        self._forget(found)

    def _find_files(self) -> None:
        used = []
        for path in self._directory.glob("*/*/*"):
            match, about = _KEY_FILE.fullmatch(path.name), path.stat()
            if match is not None:
                used.append((about.st_mtime_ns, path.parts[-3], bytes.fromhex(match[1]), about.st_size))
            elif _DRAFT.fullmatch(path.name) and time.time() - about.st_mtime > DRAFT_MAX_AGE_S:
                path.unlink(missing_ok=True)
        for _, generation, key, size in sorted(used):
            self._sizes[generation, key] = size
            self._bytes += size

    def _shrink(self) -> None:
        with self._lock:
            surplus, over = [], self._bytes - self._budget_bytes
            for entry, size in self._sizes.items():
                if over <= 0:
                    break
                surplus.append(entry)
                over -= size
        self._forget(surplus)

    def _forget(self, entries: Iterable[tuple[str, bytes]]) -> None:
        for generation, key in entries:
            with self._lock:
                self._bytes -= self._sizes.pop((generation, key), 0)
            try:
                self._path(generation, key).unlink(missing_ok=True)
            except OSError as error:
                self._complain(error)

    def _path(self, generation: str, key: bytes) -> Path:
        return self._directory / generation / key.hex()[:2] / f"{key.hex()}.record"

    def _complain(self, error: OSError) -> None:
        if not self._complained:
            self._complained = True
            log.warning("the disk cache can't be written (%s): users not in memory come from the store", error.strerror or error)


class DiskRecords:
    """The tier as one pull sees it: one generation's records. hit: whether the last `get` found one."""

    def __init__(self, tier: DiskTier, generation: str) -> None:
        self._tier, self._generation = tier, generation
        self.hit = False

    def get(self, key: bytes) -> bytes | None:
        found = self._tier.get(self._generation, key)
        self.hit = found is not None
        return found

    def put(self, key: bytes, stored: bytes) -> None:
        self._tier.put(self._generation, key, stored)

    def drop(self, key: bytes) -> None:
        self.hit = False
        self._tier.drop(self._generation, key)
