"""Objects as files below one folder of the local disk (or a shared file system with POSIX semantics).

Knows how to make writes atomic and durable: a temporary file, fsync, then rename (replace) or hard link (create-only).
Raises the operating system's own errors; `objects.py` words them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

HIDDEN = "."  # names that begin so are ours (temporary files, the lock) and no objects
TEMPORARY = f"{HIDDEN}tmp-"


class LocalFiles:
    """The `Backend` of file:// stores; `root` is created by the first write."""

    concurrent = False  # the page cache answers faster than a thread pool could hand the question on

    def __init__(self, root: str) -> None:
        self.root = Path(root)

    def read(self, path: str, start: int | None = None, stop: int | None = None) -> bytes:
        with (self.root / path).open("rb") as file:
            if start is None or stop is None:
                return file.read()
            return os.pread(file.fileno(), stop - start, start)

    def exists(self, path: str) -> bool:
        return (self.root / path).is_file()

    def write(self, path: str, data: bytes) -> None:
        target = self.root / path
        with _temporary(target, data) as temporary:
            os.replace(temporary, target)
        _sync_folder(target.parent)

    def create(self, path: str, data: bytes) -> None:
        target = self.root / path
        with _temporary(target, data) as temporary:
            os.link(temporary, target)  # unlike rename, refuses to replace
        _sync_folder(target.parent)

    def read_tagged(self, path: str) -> tuple[bytes, str]:
        data = self.read(path)
        return data, _tag(data)

    def replace_if(self, path: str, data: bytes, tag: str) -> None:
        with self._locked():
            if self.read_tagged(path)[1] != tag:
                raise FileExistsError(path)
            self.write(path, data)

    def find(self, folder: str) -> list[tuple[str, int, str, float]]:
        found = []
        for parent, folders, names in os.walk(self.root / folder, onerror=_raise_unless_missing):
            folders[:] = [name for name in folders if not name.startswith(HIDDEN)]
            for name in names:
                if name.startswith(HIDDEN):
                    continue
                file = Path(parent, name)
                with contextlib.suppress(FileNotFoundError):  # deleted since it was listed
                    status = file.stat()
                    tag = f"{status.st_mtime_ns}-{status.st_ino}"
                    found.append((file.relative_to(self.root).as_posix(), status.st_size, tag, status.st_mtime))
        return found

    def folders(self, folder: str) -> list[str]:
        try:
            entries = list(os.scandir(self.root / folder))
        except FileNotFoundError:
            return []
        return [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(HIDDEN)]

    def delete(self, path: str) -> None:
        (self.root / path).unlink(missing_ok=True)

    def prune(self, folder: str) -> None:
        shutil.rmtree(self.root / folder, ignore_errors=True)

    def abort_uploads(self, older_than_s: float) -> int:
        """Delete the temporary files of writers that were killed."""
        aborted = 0
        for parent, _, names in os.walk(self.root):
            for name in names:
                file = Path(parent, name)
                with contextlib.suppress(FileNotFoundError):  # renamed or deleted since it was listed
                    if name.startswith(TEMPORARY) and time.time() - file.stat().st_mtime >= older_than_s:
                        file.unlink()
                        aborted += 1
        return aborted

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the store's one lock for compare-and-replace, against other threads and other processes."""
        _make_folder(self.root)
        with (self.root / f"{HIDDEN}lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed, also by a crash
            yield


@contextlib.contextmanager
def _temporary(target: Path, data: bytes) -> Iterator[Path]:
    """A synced file with `data` beside `target`; removed at the end if it is still there."""
    _make_folder(target.parent)
    temporary = target.parent / f"{TEMPORARY}{uuid.uuid4().hex}"
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _make_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    try:
        folder.mkdir(exist_ok=True)
    except FileExistsError as error:  # would read as "the object exists already"
        raise NotADirectoryError(errno.ENOTDIR, f"{folder} is a file, not a folder") from error
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable: fsync of a file doesn't cover the entry that points to it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _tag(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
