"""Noting who was served: in memory at once, in the store now and then, and never lost by a store that is away."""

from __future__ import annotations

import threading
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from plora_ray.errors import StoreError
from plora_ray.inference import uses
from plora_ray.inference.uses import UseRecorder
from plora_ray.store.objects import ObjectStore
from plora_ray.store.uses import read_uses, today, uses_since


@pytest.fixture
def objects() -> ObjectStore:
    return ObjectStore(f"memory://{uuid.uuid4().hex}")


def written(objects: ObjectStore) -> set[bytes]:
    return {key.tobytes() for key in read_uses(objects, today())}


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def test_what_many_threads_note_is_written_once_at_the_end(objects: ObjectStore) -> None:
    recorder = UseRecorder(objects, write_s=3600)
    with ThreadPoolExecutor(8) as pool:
        for start in range(0, 400, 10):
            pool.submit(recorder.note, [key(number % 300) for number in range(start, start + 10)])
    assert objects.list("used") == [], "a request writes nothing"
    recorder.close()
    assert written(objects) == {key(number) for number in range(300)} and uses_since(objects) == today()
    assert len(objects.list("used")) == 2  # since when, and one object of the day


def test_what_a_store_that_is_away_did_not_take_is_written_by_the_next_write(
    objects: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = UseRecorder(objects, write_s=3600)
    recorder.note([key(1)])
    with monkeypatch.context() as away:
        away.setattr(uses, "write_uses", lambda *_: (_ for _ in ()).throw(StoreError("away")))
        with pytest.raises(StoreError, match="away"):
            recorder.write()
        recorder.note([key(2)])
    recorder.write()
    assert written(objects) == {key(1), key(2)}
    recorder.close()
    assert len(objects.list("used")) == 2


def test_memory_is_bounded_and_a_full_one_is_written_at_once(objects: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    done = threading.Event()
    write = UseRecorder.write
    monkeypatch.setattr(UseRecorder, "write", lambda self: (write(self), done.set())[0])
    recorder = UseRecorder(objects, write_s=3600, max_keys=3)
    recorder.note([key(1), key(2), key(3)])
    recorder.note([key(4)])
    assert done.wait(30) and written(objects) == {key(1), key(2), key(3)}
    recorder.note([key(5)])
    recorder.close()
    assert written(objects) == {key(number) for number in (1, 2, 3, 5)}
