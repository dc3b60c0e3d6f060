"""Objects in this process's memory, shared by all stores of one memory:// name: for trials and tests, gone at exit."""

from __future__ import annotations

import itertools
import threading
import time

_lock = threading.Lock()
_stores: dict[str, dict[str, tuple[bytes, str, float]]] = {}  # root -> path -> (bytes, tag, time)
_versions = itertools.count()


class MemoryObjects:
    """The `Backend` of memory:// stores."""

    concurrent = False

    def __init__(self, root: str) -> None:
        with _lock:
            self._objects = _stores.setdefault(root, {})

    def read(self, path: str, start: int | None = None, stop: int | None = None) -> bytes:
        return self.read_tagged(path)[0][start:stop]

    def read_tagged(self, path: str) -> tuple[bytes, str]:
        with _lock:
            if path not in self._objects:
                raise FileNotFoundError(path)
            return self._objects[path][:2]

    def exists(self, path: str) -> bool:
        return path in self._objects

    def write(self, path: str, data: bytes) -> None:
        with _lock:
            self._objects[path] = (bytes(data), str(next(_versions)), time.time())

    def create(self, path: str, data: bytes) -> None:
        with _lock:
            if path in self._objects:
                raise FileExistsError(path)
            self._objects[path] = (bytes(data), str(next(_versions)), time.time())

    def replace_if(self, path: str, data: bytes, tag: str) -> None:
        with _lock:
            if path not in self._objects or self._objects[path][1] != tag:
                raise FileExistsError(path)
            self._objects[path] = (bytes(data), str(next(_versions)), time.time())

    def find(self, folder: str) -> list[tuple[str, int, str, float]]:
        prefix = f"{folder}/" if folder else ""
        with _lock:
            return [(path, len(data), tag, at) for path, (data, tag, at) in self._objects.items() if path.startswith(prefix)]

    def folders(self, folder: str) -> list[str]:
        prefix = f"{folder}/" if folder else ""
        rest = [path.removeprefix(prefix) for path, *_ in self.find(folder)]
        return list({name.split("/", 1)[0] for name in rest if "/" in name})

    def delete(self, path: str) -> None:
        with _lock:
            self._objects.pop(path, None)

    def prune(self, folder: str) -> None:
        """There are only objects here."""

    def abort_uploads(self, older_than_s: float) -> int:
        return 0  # writes are never half done
