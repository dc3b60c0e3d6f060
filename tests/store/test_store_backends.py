"""Storage of other kinds, and large objects: what is promised holds, and what can't be promised is refused."""

from __future__ import annotations

import importlib.util
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fsspec.registry import known_implementations

from cluster.s3_server import S3Server
from plora_ray.errors import StoreError
from plora_ray.store import AdapterStore, ObjectStore, s3_multipart
from plora_ray.store.object_errors import ObjectExists
from tests.chaos.faulty_s3 import FaultyS3

LARGE = np.random.default_rng(0).bytes(11 * 2**20)  # three parts


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest parts that S3 allows."""
    monkeypatch.setattr(s3_multipart, "PART_BYTES", 5 * 2**20)
    monkeypatch.setattr(s3_multipart, "MIN_BYTES", 10 * 2**20)


@pytest.fixture
def proxy(s3_server: S3Server, small_parts: None) -> Iterator[FaultyS3]:
    with FaultyS3(s3_server.endpoint_url) as proxy:
        yield proxy


@pytest.fixture
def bucket(s3_server: S3Server, proxy: FaultyS3) -> ObjectStore:
    options = s3_server.storage_options | {"endpoint_url": proxy.endpoint_url}
    return ObjectStore(f"s3://adapters/{uuid.uuid4().hex}", options, retry_s=60)


def requests(proxy: FaultyS3, method: str, mark: str) -> int:
    return sum(request.startswith(method) and mark in request for request, _ in proxy.delivered)


@pytest.mark.parametrize("place", ["file"], indirect=True)
def test_a_file_system_without_conditional_writes_can_be_read_and_is_refused_before_the_first_write(
    store: AdapterStore, publish: Callable[..., None], make_users: Callable[..., Any], make_fresh: Callable[..., Any]
) -> None:
    users = make_users(20)
    publish("g1", users)
    fresh = make_fresh("user-3", store.open_generation().basis)
    store.put_fresh(fresh)
    store.erase(store.key("user-4"))
    before = [(item.path, item.tag) for item in store.objects.list()]

    elsewhere = AdapterStore.open(store.uri.replace("file://", "local://"))
    reader = elsewhere.open_generation()
    served = {key: found.record for key in users if (found := elsewhere.pull(reader, key)) is not None}
    expected = {key: record for key, (record, _) in users.items()} | {fresh.key: fresh.record}
    del expected[store.key("user-4")]
    assert {key: record.tobytes() for key, record in served.items()} == {key: record.tobytes() for key, record in expected.items()}
    assert [item.path for item in elsewhere.objects.list() if item.path != ".lock"] == [path for path, _ in before]
    assert elsewhere.objects.folders() == store.objects.folders() and elsewhere.objects.exists("current")
    refused: list[Callable[[], object]] = [
        lambda: elsewhere.begin("g2"),
        lambda: elsewhere.activate("g1"),
        lambda: elsewhere.put_fresh(make_fresh("user-5")),
        lambda: elsewhere.erase(store.key("user-5")),
        lambda: elsewhere.objects.delete("current"),
    ]
    for write in refused:
        with pytest.raises(StoreError, match="can be read, not written: local:// has no conditional writes"):
            write()
    assert [(item.path, item.tag) for item in store.objects.list()] == before


def test_storage_whose_package_is_missing_says_what_to_install() -> None:
    missing = {scheme: entry["err"] for scheme, entry in known_implementations.items() if "err" in entry and not installed(entry["class"])}
    scheme, advice = next(iter(missing.items()))
    with pytest.raises(StoreError) as caught:
        ObjectStore(f"{scheme}://somewhere/x")
    assert advice in str(caught.value) and "\n" not in str(caught.value)


def installed(name: str) -> bool:
    return importlib.util.find_spec(name.split(".")[0]) is not None


def test_a_large_object_arrives_in_parts_is_created_only_once_and_is_replaced_whole(bucket: ObjectStore, proxy: FaultyS3) -> None:
    bucket.create("large", LARGE)
    assert requests(proxy, "PUT", "partNumber=") == 3 and bucket.read("large") == LARGE
    with pytest.raises(ObjectExists):
        bucket.create("large", LARGE[::-1])
    assert bucket.read("large") == LARGE and bucket.abort_uploads(0) == 0
    assert bucket.update("large", lambda _: LARGE[::-1]) == LARGE[::-1] == bucket.read("large")


def test_a_part_that_fails_is_sent_again_alone_and_a_lost_completion_is_recognised(bucket: ObjectStore, proxy: FaultyS3) -> None:
    broken = proxy.fail("reset", r"PUT .*partNumber=2", seconds=0.1)
    bucket.create("first", LARGE)
    sent = requests(proxy, "POST", "uploads")
    assert broken.began_s is not None and bucket.read("first") == LARGE and sent == 1
    lost = proxy.fail("lost", r"POST .*uploadId=", seconds=0.2)
    bucket.create("second", LARGE)
    assert lost.began_s is not None and bucket.read("second") == LARGE and bucket.abort_uploads(0) == 0


def test_what_an_upload_left_that_could_not_end_is_unseen_and_dropped_when_it_is_old(bucket: ObjectStore, proxy: FaultyS3) -> None:
    impatient = ObjectStore(bucket.uri, bucket.storage_options, retry_s=0.0)
    proxy.fail("503", r"PUT .*partNumber=3", seconds=3600)
    with pytest.raises(StoreError, match="can't create"):
        impatient.create("large", LARGE)
    proxy.heal()
    assert not bucket.exists("large") and bucket.list() == []
    assert ObjectStore(f"{bucket.uri}-neighbour", bucket.storage_options).abort_uploads(0) == 0
    assert bucket.abort_uploads(3600) == 0 and bucket.abort_uploads(0) == 1 and bucket.abort_uploads(0) == 0


def test_the_temporary_file_of_a_killed_writer_is_dropped_when_it_is_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = ObjectStore(str(tmp_path))
    objects.write("a/b", b"whole")
    killed = tmp_path / "a" / ".tmp-0"
    killed.write_bytes(b"half")
    assert objects.abort_uploads(60) == 0 and killed.exists()
    os.utime(killed, (1, 1))
    assert objects.abort_uploads(60) == 1 and not killed.exists() and objects.read("a/b") == b"whole"
