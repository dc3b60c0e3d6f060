"""Whole objects under one root, a folder or a bucket, behind a few thread-safe calls.

Knows names, bytes, retries and conditional writes; knows nothing of what the bytes mean, nor of any storage library: each
kind of storage is a `Backend` in a file of its own (`backends.py` names them).
Every failure leaves as a StoreError of one line that names the object and says what to check.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeVar

from plora_ray.errors import StoreError
from plora_ray.store.backends import open_backend
from plora_ray.store.object_errors import (
    ObjectExists,
    ObjectNotFound,
    is_beyond_end,
    is_refused_condition,
    store_error,
)
from plora_ray.store.retries import retrying

SERVING_RETRY_S = 3.0  # a request waits for it; jobs, which can wait, give more
MAX_UPDATES = 50  # a compare-and-replace that loses this often is a bug or a hot spot, not bad luck
READ_THREADS = 32
PROBE = "probe"  # the folder of what a probe writes and deletes again

_PATH = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class ObjectInfo:
    """One listed object; `tag` changes whenever its bytes are replaced, which was last at `modified_s`, Unix time by the store's clock."""

    path: str
    size: int
    tag: str
    modified_s: float


@dataclass(frozen=True)
class ObjectRange:
    """Bytes [start, stop) of an object, or all of it when both are None."""

    path: str
    start: int | None = None
    stop: int | None = None


class ObjectStore:
    """All objects below `uri`: an absolute or relative path, file:///path, s3://bucket[/prefix], memory://name, or any other URI
    that fsspec knows (gs://, az://, ...).

    storage_options go to fsspec's file system (for S3: key, secret, endpoint_url, client_kwargs, ...); files and memory take none.
    retry_s: how long a call that meets passing failures (503, a broken connection, ...) is tried again, with random back-off.
    Paths are relative names of letters, digits and `._-`, with no part that begins with a dot. Raises StoreError for an
    unusable URI. A copy sent to another process (or inherited by a fork) opens its own connections.
    """

    def __init__(self, uri: str, storage_options: dict[str, Any] | None = None, *, retry_s: float = SERVING_RETRY_S) -> None:
        self.storage_options = dict(storage_options or {})
        self.retry_s = retry_s
        self.uri, self._backend = open_backend(uri, self.storage_options)
        self._pool: tuple[int, ThreadPoolExecutor] | None = None
        self._proven = False

    def __reduce__(self) -> tuple[Callable[..., ObjectStore], tuple[str, dict[str, Any], float]]:
        return _reopen, (self.uri, self.storage_options, self.retry_s)

    def __repr__(self) -> str:
        return f"ObjectStore({self.uri!r})"  # never the options: they hold credentials

    def uri_of(self, path: str) -> str:
        """The object's full URI, for messages."""
        return f"{self.uri}/{path}"

    def read(self, path: str) -> bytes:
        """The whole object. Raises ObjectNotFound."""
        return self._call("read", path, self._backend.read, path)

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop), fewer (or none) where the object ends before `stop`. Raises ObjectNotFound."""
        if not 0 <= start < stop:
            raise ValueError(f"a range needs 0 <= start < stop, got [{start}, {stop})")
        try:
            return self._call("read", path, self._backend.read, path, start, stop)
        except StoreError as error:
            if error.__cause__ is not None and is_beyond_end(error.__cause__):
                return b""
            raise

    def read_many(self, paths: Iterable[str]) -> dict[str, bytes]:
        """Whole objects by path, read at the same time; missing ones are left out."""
        wanted = list(dict.fromkeys(paths))
        found = self.read_ranges([ObjectRange(path) for path in wanted])
        return {path: data for path, data in zip(wanted, found, strict=True) if data is not None}

    def read_ranges(self, ranges: Sequence[ObjectRange]) -> list[bytes | None]:
        """The bytes of every range, in order, read at the same time; None for an object that doesn't exist."""
        if len(ranges) < 2 or not self._backend.concurrent:
            return [self._read_or_none(item) for item in ranges]
        return list(self._threads().map(self._read_or_none, ranges))

    async def read_ranges_async(self, ranges: Sequence[ObjectRange]) -> list[bytes | None]:
        """As `read_ranges`, without blocking the event loop: the store's READ_THREADS threads wait for the storage.

        Cancelled, it drops the reads that no thread has begun; others' reads go on.
        """
        reads = [self._threads().submit(self._read_or_none, item) for item in ranges]
        return list(await asyncio.gather(*map(asyncio.wrap_future, reads)))

    def exists(self, path: str) -> bool:
        return self._call("look up", path, self._backend.exists, path)

    def write(self, path: str, data: bytes) -> None:
        """Write the object, replacing any older one at once: a reader sees the old bytes or the new ones."""
        self._call("write", path, self._backend.write, path, data)

    def create(self, path: str, data: bytes) -> None:
        """Write an object that mustn't exist yet with other bytes. Raises ObjectExists, with the older object untouched."""
        self._conditional("create", path, data, 1, self._backend.create, path, data)

    def _conditional(self, verb: str, path: str, data: bytes, doubtful: int, write: Callable[..., None], *arguments: Any) -> None:
        """A write that is refused if another writer came first. Raises ObjectExists or ObjectNotFound then.

        doubtful: a refusal after so many attempts may be of our own success, whose answer was lost on the way; then, if the object
        is as it was to be, it is ours. 1 where it wouldn't matter if it were another's: some file systems try again unseen.
        """
        attempts = 0

        def attempt() -> None:
            nonlocal attempts
            attempts += 1
            write(*arguments)

        try:
            self._call(verb, path, attempt)
        except ObjectExists:
            if attempts < doubtful or self._read_or_none(ObjectRange(path)) != data:
                raise

    def update(self, path: str, change: Callable[[bytes | None], bytes | None]) -> bytes | None:
        """Compare and replace: `change` gets the object's bytes (None if missing) and returns new ones, or None to leave it.

        `change` is called again whenever another writer came first, so it must be free of side effects. Returns the bytes
        that stand at the end; whatever `change` raises passes through.
        """
        for round_ in range(MAX_UPDATES):
            try:
                old, tag = self._call("read", path, self._backend.read_tagged, path)
            except ObjectNotFound:
                old, tag = None, None
            new = change(old)
            if new is None or new == old:
                return old
            try:
                if tag is None:
                    self._conditional("create", path, new, 2, self._backend.create, path, new)
                else:
                    self._conditional("replace", path, new, 2, self._backend.replace_if, path, new, tag)
                return new
            except (ObjectExists, ObjectNotFound):
                time.sleep(random.uniform(0, min(0.5, 0.005 * 2**round_)))
        raise StoreError(f"can't update {self.uri_of(path)}: other writers replaced it {MAX_UPDATES} times; try again")

    def update_many(self, changes: Mapping[str, Callable[[bytes | None], bytes | None]]) -> None:
        """`update` of several objects by path, at the same time: even a local disk syncs many files faster than one after the other.

        A change may make calls of its own, but none that reads many. Returns, or raises one of the errors, when all have ended.
        """
        updates = [self._threads().submit(self.update, path, change) for path, change in changes.items()]
        wait(updates)
        for update in updates:
            update.result()

    def folders(self, folder: str = "") -> list[str]:
        """Names of the folders right below `folder`, sorted; costs no listing of what is in them."""
        return sorted(self._call("list", folder, self._backend.folders, folder))

    def list(self, folder: str = "") -> list[ObjectInfo]:
        """All objects below `folder`, at any depth, sorted by path; none if it doesn't exist."""
        found = self._call("list", folder, self._backend.find, folder)
        return sorted((ObjectInfo(*item) for item in found), key=lambda item: item.path)

    def delete(self, path: str) -> None:
        """Delete the object; fine if there is none."""
        try:
            self._call("delete", path, self._backend.delete, path)
        except ObjectNotFound:
            return

    def delete_folder(self, folder: str, last: str = "") -> None:
        """Delete everything below `folder`, whoever wrote it and whatever its name; the object `last` after all others."""
        found = [item.path for item in self.list(folder)]
        for path in sorted(found, key=lambda path: path == last):
            try:
                self._retried("delete", path, self._backend.delete, path)
            except ObjectNotFound:
                continue
        self._retried("delete", folder, self._backend.prune, folder)

    def abort_uploads(self, older_than_s: float) -> int:
        """Drop what killed writers left half-written longer than `older_than_s` ago, which no listing shows; returns how many."""
        return self._call("clean up", "", self._backend.abort_uploads, older_than_s)

    def probe(self) -> None:
        """Prove, once, that this store can be written and honours conditions. Raises StoreError with the reason if not."""
        if self._proven:
            return
        path = f"{PROBE}/{uuid.uuid4().hex}"
        self.create(path, b"first")
        try:
            stale = self._call("read", path, self._backend.read_tagged, path)[1]
            self._conditional("replace", path, b"second", 2, self._backend.replace_if, path, b"second", stale)
            for condition, refused_write in (
                ("create-only writes (If-None-Match)", lambda: self._backend.create(path, b"third")),
                ("conditional replaces (If-Match)", lambda: self._backend.replace_if(path, b"fourth", stale)),
            ):
                try:
                    self._call("write", path, refused_write)
                except ObjectExists:
                    continue
                raise StoreError(f"{self.uri} ignores {condition}, so two writers could undo each other; choose another store")
        finally:
            self.delete(path)
        self._proven = True

    def _read_or_none(self, item: ObjectRange) -> bytes | None:
        try:
            if item.start is None or item.stop is None:
                return self.read(item.path)
            return self.read_range(item.path, item.start, item.stop)
        except ObjectNotFound:
            return None

    def _call(self, verb: str, path: str, function: Callable[..., _Result], *arguments: Any) -> _Result:
        """`function(*arguments)` with retries, and with its errors put into the store's words."""
        if path and not _PATH.fullmatch(path):
            raise StoreError(f"{path!r} can't name an object: use letters, digits and ._- in parts that don't begin with a dot")
        return self._retried(verb, path, function, *arguments)

    def _retried(self, verb: str, path: str, function: Callable[..., _Result], *arguments: Any) -> _Result:
        """As `_call`, for names that a listing gave: other libraries may have chosen them."""
        try:
            return retrying(self.retry_s)(function, *arguments)
        except StoreError:
            raise
        except Exception as error:
            if is_refused_condition(error):
                raise ObjectExists(f"{self.uri_of(path)} exists already or was replaced by another writer") from error
            raise store_error(verb, self.uri_of(path), error) from error

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None or self._pool[0] != os.getpid():
            self._pool = (os.getpid(), ThreadPoolExecutor(READ_THREADS, thread_name_prefix="store-read"))
        return self._pool[1]


def _reopen(uri: str, storage_options: dict[str, Any], retry_s: float) -> ObjectStore:
    return ObjectStore(uri, storage_options, retry_s=retry_s)
