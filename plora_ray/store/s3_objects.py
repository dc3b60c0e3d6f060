"""Objects in an S3 bucket, through fsspec's S3 file system: one request a call, conditions as S3 knows them.

Large objects go in parts (`s3_multipart.py`). Raises fsspec's and botocore's own errors, once: `objects.py` retries and words them.
"""

from __future__ import annotations

import os
import re
from typing import Any

import fsspec

from plora_ray.store import s3_multipart

CONNECT_TIMEOUT_S = 10
READ_TIMEOUT_S = 60
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


def is_bucket(name: str) -> bool:
    """Whether S3 allows a bucket of this name."""
    return _BUCKET.fullmatch(name) is not None


class S3Objects:
    """The `Backend` of s3:// stores; `root` is bucket[/prefix], `storage_options` are fsspec's."""

    concurrent = True

    def __init__(self, root: str, storage_options: dict[str, Any]) -> None:
        self._root = root
        self._bucket = root.split("/", 1)[0]
        self._options = storage_options
        # By process id. What a fork inherited stays here unused: collecting it would close its parent's connections.
        self._opened: dict[int, Any] = {}

    def read(self, path: str, start: int | None = None, stop: int | None = None) -> bytes:
        if start is None or stop is None:
            return bytes(self._fs().cat_file(self._full(path), max_concurrency=1))  # more would cost a HEAD first
        return bytes(self._fs().cat_file(self._full(path), start=start, end=stop))

    def read_tagged(self, path: str) -> tuple[bytes, str]:
        # The tag first: were the object replaced in between, the write that names the old tag would be refused.
        tag = str(self._head(path)["ETag"])
        return self.read(path), tag

    def exists(self, path: str) -> bool:
        try:
            self._head(path)
        except FileNotFoundError:
            return False
        return True

    def write(self, path: str, data: bytes) -> None:
        self._put(path, data)

    def create(self, path: str, data: bytes) -> None:
        self._put(path, data, IfNoneMatch="*")

    def replace_if(self, path: str, data: bytes, tag: str) -> None:
        self._put(path, data, IfMatch=tag)

    def find(self, folder: str) -> list[tuple[str, int, str, float]]:
        found = self._fs().find(self._full(folder), detail=True)
        start = len(self._root) + 1
        return [(name[start:], int(entry["size"]), str(entry["ETag"]), entry["LastModified"].timestamp()) for name, entry in found.items()]

    def folders(self, folder: str) -> list[str]:
        try:
            entries = self._fs().ls(self._full(folder), detail=True)
        except FileNotFoundError as error:
            if error.__cause__ is not None:  # the bucket is missing, not just anything below the folder
                raise
            return []
        return [entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in entries if entry["type"] == "directory"]

    def delete(self, path: str) -> None:
        self._fs().call_s3("delete_object", Bucket=self._bucket, Key=self._key(path))

    def prune(self, folder: str) -> None:
        """There are only objects in a bucket."""

    def abort_uploads(self, older_than_s: float) -> int:
        return s3_multipart.abort_uploads(self._fs(), self._bucket, self._key("") + "/" if self._key("") else "", older_than_s)

    def _put(self, path: str, data: bytes, **condition: str) -> None:
        if len(data) >= s3_multipart.MIN_BYTES:
            s3_multipart.upload(self._fs(), self._bucket, self._key(path), data, **condition)
        else:
            self._fs().call_s3("put_object", Bucket=self._bucket, Key=self._key(path), Body=data, **condition)

    def _head(self, path: str) -> dict[str, Any]:
        head: dict[str, Any] = self._fs().call_s3("head_object", Bucket=self._bucket, Key=self._key(path))
        return head

    def _fs(self) -> Any:
        """This process's file system object: fsspec's belong to one process and don't survive a fork."""
        if os.getpid() not in self._opened:
            options = dict(self._options)
            defaults = {
                "connect_timeout": CONNECT_TIMEOUT_S,
                "read_timeout": READ_TIMEOUT_S,
                "retries": {"mode": "standard", "total_max_attempts": 1},
            }
            options["config_kwargs"] = defaults | dict(options.get("config_kwargs") or {})
            fs = fsspec.filesystem("s3", **options, use_listings_cache=False, skip_instance_cache=True)
            # Retries happen in one place, which must know of them: a create repeated unseen would look like somebody else's.
            fs.retries = 1
            self._opened[os.getpid()] = fs
        return self._opened[os.getpid()]

    def _full(self, path: str) -> str:
        return f"{self._root}/{path}".rstrip("/")

    def _key(self, path: str) -> str:
        return self._full(path)[len(self._bucket) + 1 :]
