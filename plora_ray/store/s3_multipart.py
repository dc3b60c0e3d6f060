"""One large S3 object in parts that travel at the same time, judged once, when the parts are put together.

Until then nobody sees anything of it, so a condition holds for the whole object. Knows S3's multipart calls; doesn't know what the
object is. An upload that fails is aborted; one whose process was killed stays, unseen and paid for, until `abort_uploads`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

from fsspec.asyn import sync

from plora_ray.store.retries import retrying_parts

MIN_BYTES = 64 * 2**20  # smaller objects go in one request
PART_BYTES = 16 * 2**20  # S3 takes at most 10,000 parts, so an object has at most 156 GiB
PARTS_AT_ONCE = 4  # what an upload holds beside the object itself: so many copies of parts


def upload(fs: Any, bucket: str, key: str, data: bytes, **condition: str) -> None:
    """Write the object. condition: IfNoneMatch or IfMatch, as `complete_multipart_upload` takes them."""
    sync(fs.loop, _upload, fs, {"Bucket": bucket, "Key": key}, memoryview(data), condition)


async def _upload(fs: Any, name: dict[str, str], data: memoryview, condition: dict[str, str]) -> None:
    upload = {**name, "UploadId": (await fs._call_s3("create_multipart_upload", **name))["UploadId"]}
    free = asyncio.Semaphore(PARTS_AT_ONCE)

    async def send(number: int) -> dict[str, Any]:
        async with free:
            body = bytes(data[(number - 1) * PART_BYTES : number * PART_BYTES])
            answer: dict[str, Any] = await retrying_parts()(fs._call_s3, "upload_part", **upload, PartNumber=number, Body=body)
            return {"PartNumber": number, "ETag": answer["ETag"]}

    try:
        async with asyncio.TaskGroup() as group:  # the first part that fails ends the others
            sent = [group.create_task(send(number)) for number in range(1, -(-len(data) // PART_BYTES) + 1)]
        parts = {"Parts": [task.result() for task in sent]}
        await fs._call_s3("complete_multipart_upload", **upload, MultipartUpload=parts, **condition)
    except BaseException as error:
        with contextlib.suppress(Exception):  # it was completed after all, or the storage is away: `abort_uploads` finds it
            await fs._call_s3("abort_multipart_upload", **upload)
        raise error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error  # noqa: B904


def abort_uploads(fs: Any, bucket: str, prefix: str, older_than_s: float) -> int:
    """Abort the unfinished uploads of keys that begin with `prefix`, begun longer than `older_than_s` ago; returns how many."""
    aborted, markers = 0, dict[str, str]()
    while True:
        page = fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix, **markers)
        for found in page.get("Uploads") or []:
            if time.time() - found["Initiated"].timestamp() >= older_than_s and found["Key"].startswith(prefix):
                fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=found["Key"], UploadId=found["UploadId"])
                aborted += 1
        if not page.get("IsTruncated"):
            return aborted
        markers = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}
