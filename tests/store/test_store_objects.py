"""Objects: whole, atomic, created once, and every failure a sentence."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest

from plora_ray.errors import StoreError
from plora_ray.store.object_errors import ObjectExists, ObjectNotFound
from plora_ray.store.objects import ObjectRange, ObjectStore

Place = tuple[str, dict[str, Any] | None]


@pytest.fixture
def objects(place: Place) -> ObjectStore:
    return ObjectStore(*place)


def test_what_is_written_is_read_whole_in_part_and_many_at_once(objects: ObjectStore) -> None:
    objects.write("a/one", b"0123456789")
    objects.write("a/two", b"")
    objects.write("a/one", b"abcdefghij")
    assert objects.read("a/one") == b"abcdefghij"
    assert objects.read_range("a/one", 2, 5) == b"cde"
    assert objects.read_range("a/one", 8, 50) == b"ij"
    assert objects.read_range("a/one", 20, 30) == b""
    assert objects.read_many(["a/one", "a/none", "a/two"]) == {"a/one": b"abcdefghij", "a/two": b""}
    assert objects.read_ranges([ObjectRange("a/one", 0, 2), ObjectRange("no"), ObjectRange("a/one", 1, 3)]) == [b"ab", None, b"bc"]


def test_listing_is_sorted_recursive_and_tagged_by_content(objects: ObjectStore) -> None:
    assert objects.list() == [] and objects.list("x") == [] and objects.folders("x") == []
    for path in ("x/b/1", "x/a/2", "x/a/1", "y"):
        objects.write(path, path.encode())
    assert [(item.path, item.size) for item in objects.list("x")] == [("x/a/1", 5), ("x/a/2", 5), ("x/b/1", 5)]
    assert [item.path for item in objects.list()] == ["x/a/1", "x/a/2", "x/b/1", "y"]
    assert objects.folders("x") == ["a", "b"] and objects.folders() == ["x"]
    before = objects.list("x")[0].tag
    objects.write("x/a/1", b"other")
    assert objects.list("x")[0].tag != before


def test_a_missing_object_is_not_found_and_may_be_deleted(objects: ObjectStore) -> None:
    assert not objects.exists("nothing")
    with pytest.raises(ObjectNotFound, match="can't read .*/nothing: it doesn't exist"):
        objects.read("nothing")
    objects.delete("nothing")
    objects.write("something", b"1")
    assert objects.exists("something")
    objects.delete("something")
    assert not objects.exists("something")


def test_of_two_writers_that_create_one_object_one_wins(objects: ObjectStore) -> None:
    outcomes: list[str] = []
    ready = threading.Barrier(4)

    def create(name: str) -> None:
        ready.wait()
        try:
            objects.create("claim", name.encode())
            outcomes.append(name)
        except ObjectExists:
            outcomes.append("refused")

    threads = [threading.Thread(target=create, args=(f"writer-{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("refused") == 3
    assert objects.read("claim").decode() in outcomes


def test_no_update_of_many_threads_is_lost(objects: ObjectStore) -> None:
    def count_up() -> None:
        for _ in range(5):
            objects.update("counter", lambda data: str(int(data or b"0") + 1).encode())

    threads = [threading.Thread(target=count_up) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert objects.read("counter") == b"20"


def test_a_create_whose_answer_was_lost_is_a_success(objects: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    create, calls = objects._backend.create, []

    def losing_the_answer(path: str, data: bytes) -> None:
        calls.append(path)
        create(path, data)
        if len(calls) == 1:
            raise ConnectionResetError("the connection broke")

    monkeypatch.setattr(objects._backend, "create", losing_the_answer)
    objects.create("once", b"mine")
    assert len(calls) == 2 and objects.read("once") == b"mine"
    calls.clear()
    objects.write("twice", b"theirs")
    monkeypatch.setattr(objects._backend, "create", lambda path, data: calls.append(path) or (_ for _ in ()).throw(FileExistsError()))
    with pytest.raises(ObjectExists):
        objects.create("twice", b"mine")


def test_the_probe_accepts_a_store_that_honours_conditions_and_leaves_nothing(objects: ObjectStore) -> None:
    objects.probe()
    assert objects.list("probe") == []


def test_the_probe_refuses_a_store_that_ignores_create_only_writes(objects: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects._backend, "create", objects._backend.write)
    with pytest.raises(StoreError, match="ignores create-only writes"):
        objects.probe()


def test_a_copied_store_handle_opens_its_own_connections(objects: ObjectStore) -> None:
    objects.write("here", b"1")
    assert copy.deepcopy(objects).read("here") == b"1"


@pytest.mark.parametrize("path", ["../up", "/abs", "a//b", "a/../b", ".hidden", "a/", "ü", "a b", ""])
def test_a_name_that_could_leave_the_store_is_refused(tmp_path: Path, path: str) -> None:
    objects = ObjectStore(str(tmp_path))
    with pytest.raises(StoreError):
        objects.write(path, b"1")
    assert list(tmp_path.iterdir()) == []


UNUSABLE = ["nonsense://host/x", "s3://", "s3://key:secret@bucket/x", "file://relative/x", "memory://", "simplecache::s3://b/x"]


@pytest.mark.parametrize("uri", UNUSABLE)
def test_an_unusable_uri_says_which_ones_are_usable(uri: str) -> None:
    with pytest.raises(StoreError):
        ObjectStore(uri)


def test_an_unwritable_folder_is_one_line_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="is a file, not a folder") as caught:
        ObjectStore(str(tmp_path / "file" / "store")).probe()
    assert "\n" not in str(caught.value)
    with pytest.raises(StoreError, match="can't create file:///proc/nowhere/probe/.*check"):
        ObjectStore("/proc/nowhere").probe()


def test_a_missing_bucket_and_an_unreachable_endpoint_are_one_line_with_the_reason(s3_server: Any) -> None:
    with pytest.raises(StoreError, match="create the bucket or correct") as caught:
        ObjectStore("s3://no-such-bucket/x", s3_server.storage_options).probe()
    assert "\n" not in str(caught.value)
    with pytest.raises(StoreError, match="create the bucket"):
        ObjectStore("s3://no-such-bucket/x", s3_server.storage_options).read("a")
    unreachable = s3_server.storage_options | {"endpoint_url": "http://127.0.0.1:9"}
    with pytest.raises(StoreError, match="can't read s3://adapters/x/a: .*check the endpoint URL") as caught:
        ObjectStore("s3://adapters/x", unreachable, retry_s=0.5).read("a")
    assert "local-secret" not in str(caught.value)


def test_a_killed_write_leaves_the_old_object_and_no_visible_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = ObjectStore(str(tmp_path))
    objects.write("a", b"old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        objects.write("a", b"new")
    assert objects.read("a") == b"old" and [item.path for item in objects.list()] == ["a"]
