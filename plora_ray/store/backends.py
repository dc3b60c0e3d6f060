"""Which storage a URI means: the folder, bucket or container behind it, as a `Backend`.

Knows the URIs and what every kind of storage must do; each kind lives in a file of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from plora_ray.errors import StoreError
from plora_ray.store.fsspec_objects import FsspecObjects
from plora_ray.store.local_files import LocalFiles
from plora_ray.store.memory_objects import MemoryObjects
from plora_ray.store.s3_objects import S3Objects, is_bucket


class Backend(Protocol):
    """What a kind of storage must do; raises FileNotFoundError, FileExistsError or its own errors.

    Writes are whole or not at all. A tag changes whenever an object's bytes are replaced.
    """

    concurrent: bool  # whether many reads at once are faster than one after the other

    def read(self, path: str, start: int | None = None, stop: int | None = None) -> bytes: ...
    def read_tagged(self, path: str) -> tuple[bytes, str]: ...
    def exists(self, path: str) -> bool: ...
    def write(self, path: str, data: bytes) -> None: ...
    def create(self, path: str, data: bytes) -> None: ...
    def replace_if(self, path: str, data: bytes, tag: str) -> None: ...
    def find(self, folder: str) -> list[tuple[str, int, str, float]]: ...  # path, size, tag, time
    def folders(self, folder: str) -> list[str]: ...
    def delete(self, path: str) -> None: ...
    def prune(self, folder: str) -> None: ...  # drop what is no object: empty folders, leftovers of killed writes
    def abort_uploads(self, older_than_s: float) -> int: ...  # drop unfinished writes; returns how many


def open_backend(uri: str, storage_options: dict[str, Any]) -> tuple[str, Backend]:
    """The normalised URI and the backend behind it. Raises StoreError for a URI or options that can't be used."""
    parts = urlsplit(uri if "://" in uri else Path(uri).absolute().as_uri())
    if parts.password is not None:
        raise StoreError("the store's URI holds a password: give credentials by the environment instead")
    root = f"{parts.netloc}{parts.path}".rstrip("/")
    if parts.scheme == "s3" and is_bucket(parts.netloc):
        return f"s3://{root}", S3Objects(root, storage_options)
    if parts.scheme == "s3":
        raise StoreError(f"{parts.netloc!r} isn't the name of an S3 bucket: write s3://bucket/prefix")
    if parts.scheme in ("file", "memory") and storage_options:
        raise StoreError(f"storage options are for s3:// and other remote stores; {uri} takes none")
    if parts.scheme == "file" and parts.netloc == "" and parts.path.startswith("/"):
        root = unquote(parts.path).rstrip("/")
        return f"file://{root}", LocalFiles(root)
    if parts.scheme == "memory" and parts.netloc:
        return f"memory://{root}", MemoryObjects(root)
    if parts.scheme in ("", "file", "memory") or "::" in uri or not root:
        raise StoreError(f"{uri!r} isn't a usable store URI: write a path, file:///path, s3://, gs:// or az://bucket/prefix, memory://name")
    return f"{parts.scheme}://{root}", FsspecObjects(parts.scheme, root, storage_options)
