"""How fsspec's file systems are asked to write only if: if there is no such object yet, or if it is still the one that was read.

fsspec itself knows only the first (`mode="create"`), and its own fallback for it looks first and writes then, which two writers
can pass at once. So only file systems whose servers judge are named here: Google Cloud Storage by an object's generation
(ifGenerationMatch), Azure Blob Storage by its ETag (If-Match).
"""

from __future__ import annotations

import json
import uuid
from typing import Any, Protocol
from urllib.parse import quote


class ConditionalWrites(Protocol):
    """tag: the field of an entry that changes with every write. Both calls raise FileExistsError or an error of HTTP status 412."""

    tag: str

    def create(self, fs: Any, path: str, data: bytes) -> None: ...
    def replace_if(self, fs: Any, path: str, data: bytes, tag: str) -> None: ...


class GoogleWrites:
    """gcsfs. One request an object, however large: it is judged as a whole, which the probe proves of all."""

    tag = "generation"

    def create(self, fs: Any, path: str, data: bytes) -> None:
        self.replace_if(fs, path, data, "0")  # the generation of what doesn't exist

    def replace_if(self, fs: Any, path: str, data: bytes, tag: str) -> None:
        bucket, key = path.split("/", 1)
        boundary = uuid.uuid4().hex  # drawn: the data can't hold it
        about = f"--{boundary}\r\nContent-Type: application/json\r\n\r\n{json.dumps({'name': key})}\r\n"
        before, after = f"{about}--{boundary}\r\nContent-Type: application/octet-stream\r\n\r\n", f"\r\n--{boundary}--"
        body = b"".join([before.encode(), data, after.encode()])
        url = f"{fs._location}/upload/storage/v1/b/{quote(bucket)}/o"
        headers = {"Content-Type": f"multipart/related; boundary={boundary}"}
        fs.call("POST", url, uploadType="multipart", ifGenerationMatch=tag, headers=headers, data=body)


class AzureWrites:
    """adlfs."""

    tag = "etag"

    def create(self, fs: Any, path: str, data: bytes) -> None:
        fs.pipe_file(path, data, mode="create")

    def replace_if(self, fs: Any, path: str, data: bytes, tag: str) -> None:
        from azure.core import MatchConditions  # comes with adlfs

        fs.pipe_file(path, data, overwrite=True, etag=tag, match_condition=MatchConditions.IfNotModified)


_WRITES: dict[str, ConditionalWrites] = dict.fromkeys(("gs", "gcs"), GoogleWrites()) | dict.fromkeys(("az", "abfs", "abfss"), AzureWrites())


def conditional_writes(scheme: str) -> ConditionalWrites | None:
    """What the file system of `scheme` can do; None if nobody judges its conditions."""
    return _WRITES.get(scheme)
