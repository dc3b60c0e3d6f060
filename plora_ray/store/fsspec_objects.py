"""Objects in whatever fsspec has a file system for: gs://, az://, abfs:// and many more, each with its own package installed.

Knows fsspec's calls and its names for what a listing says. What a file system can't do by itself, conditional writes, is in
`conditional_writes.py`; one without them can be read, not written. Raises the file systems' own errors: `objects.py` words them.
"""

from __future__ import annotations

import os
from datetime import datetime
from typing import Any

import fsspec
from fsspec.core import url_to_fs

from plora_ray.errors import StoreError
from plora_ray.store.conditional_writes import ConditionalWrites, conditional_writes

_TIMES = ("mtime", "updated", "last_modified", "LastModified", "created")  # what file systems call the time of the last write


class FsspecObjects:
    """The `Backend` of any scheme that fsspec knows; `root` is what follows scheme://, `storage_options` are the file system's.

    Raises StoreError if the file system is unknown or its package is missing; connects at the first call.
    """

    concurrent = True

    def __init__(self, scheme: str, root: str, storage_options: dict[str, Any]) -> None:
        self._uri = f"{scheme}://{root}"
        self._options = storage_options
        self._writes = conditional_writes(scheme)
        self._opened: dict[int, tuple[Any, str]] = {}  # by process id: connections don't survive a fork
        try:
            fsspec.get_filesystem_class(scheme)
        except (ImportError, ValueError) as error:
            raise StoreError(f"{scheme}:// stores need another package here: {' '.join(str(error).split())}") from error

    def read(self, path: str, start: int | None = None, stop: int | None = None) -> bytes:
        fs, full = self._at(path)
        return bytes(fs.cat_file(full) if start is None or stop is None else fs.cat_file(full, start=start, end=stop))

    def read_tagged(self, path: str) -> tuple[bytes, str]:
        # The tag first: were the object replaced in between, the write that names the old tag would be refused.
        tag = self._tag(self._info(path))
        return self.read(path), tag

    def exists(self, path: str) -> bool:
        try:
            return bool(self._info(path)["type"] == "file")
        except FileNotFoundError:
            return False

    def write(self, path: str, data: bytes) -> None:
        fs, full = self._at(path)
        self._conditions()
        fs.pipe_file(full, data)

    def create(self, path: str, data: bytes) -> None:
        self._conditions().create(*self._at(path), data)

    def replace_if(self, path: str, data: bytes, tag: str) -> None:
        self._conditions().replace_if(*self._at(path), data, tag)

    def find(self, folder: str) -> list[tuple[str, int, str, float]]:
        fs, full = self._at(folder)
        start = len(self._at("")[1]) + 1
        found = fs.find(full, detail=True)
        return [(name[start:], int(entry["size"]), self._tag(entry), _modified_s(entry)) for name, entry in found.items()]

    def folders(self, folder: str) -> list[str]:
        fs, full = self._at(folder)
        try:
            entries = fs.ls(full, detail=True)
        except FileNotFoundError:
            return []
        return [entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in entries if entry["type"] == "directory"]

    def delete(self, path: str) -> None:
        fs, full = self._at(path)
        self._conditions()
        fs.rm_file(full)

    def prune(self, folder: str) -> None:
        """There are only objects in a bucket."""

    def abort_uploads(self, older_than_s: float) -> int:
        """Google and Azure forget unfinished uploads by themselves, after a week."""
        return 0

    def _conditions(self) -> ConditionalWrites:
        if self._writes is None:
            scheme = self._uri.split(":", 1)[0]
            raise StoreError(
                f"{self._uri} can be read, not written: {scheme}:// has no conditional writes, so two writers could undo each other; "
                "write to a path, s3://, gs:// or az://"
            )
        return self._writes

    def _tag(self, entry: dict[str, Any]) -> str:
        if self._writes is not None:
            return str(entry[self._writes.tag])
        return repr(sorted((name, str(value)) for name, value in entry.items()))

    def _info(self, path: str) -> dict[str, Any]:
        fs, full = self._at(path)
        info: dict[str, Any] = fs.info(full)
        return info

    def _at(self, path: str) -> tuple[Any, str]:
        """This process's file system, and the object's name in it."""
        if os.getpid() not in self._opened:
            # A cached listing or an instance shared with other code would answer with what stood there before.
            self._opened[os.getpid()] = url_to_fs(self._uri, **self._options, use_listings_cache=False, skip_instance_cache=True)
        fs, root = self._opened[os.getpid()]
        return fs, f"{root}/{path}".rstrip("/")


def _modified_s(entry: dict[str, Any]) -> float:
    """Unix time of the last write; 0 where the file system doesn't tell."""
    value = next((entry[name] for name in _TIMES if entry.get(name) is not None), 0.0)
    return value.timestamp() if isinstance(value, datetime) else float(value)
