"""Damaged, shortened and swapped objects of every kind: a reader says so or answers as before; never anything else."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from plora_ray.errors import StoreError
from plora_ray.store import AdapterStore, GenerationReader, names
from plora_ray.store.objects import ObjectStore
from plora_ray.store.row_digests import read_row_digests

Make = Callable[..., Any]
Answers = dict[str, Any]
FLIPS = 60  # of each object, at even distances, each of another bit
KINDS = {  # one object of each, and one of the same kind that could stand in its place
    "identity": ("store.json", None),
    "current": ("current", None),
    "beginning": ("generations/g1/begun.json", "generations/g2/begun.json"),
    "manifest": ("generations/g1/manifest.json", "generations/g2/manifest.json"),
    "shared": ("generations/g1/shared.safetensors", "generations/g2/shared.safetensors"),
    "segment": ("generations/g1/segments/00000.safetensors", "generations/g1/segments/00001.safetensors"),
    "segment of another generation": ("generations/g1/segments/00001.safetensors", "generations/g2/segments/00001.safetensors"),
    "row digests": ("generations/g1/sources/00000.safetensors", "generations/g1/sources/00001.safetensors"),
    "fresh": ("user-1", "user-2"),
    "note of an erasure": ("user-3", "user-1"),
    "tombstone": ("gone-3", None),
}


@pytest.fixture
def place() -> tuple[str, dict[str, Any] | None]:
    return f"memory://{uuid.uuid4().hex}", None


@pytest.fixture
def kept(store: AdapterStore, publish: Make, make_users: Make, make_fresh: Make) -> AdapterStore:
    """Two generations of the same users and records of other numbers, two users with fresh adapters and one erased; g1 serves."""
    for generation, seed in (("g1", 1), ("g2", 2)):
        users = make_users(8, seed=seed)
        publish(generation, users, shared_value=seed)
        writer = store.begin(f"{generation}-draft")
        writer.generation = generation
        for wave, keys in enumerate(np.array_split(np.frombuffer(b"".join(sorted(users)), np.uint8).reshape(-1, 16), 2)):
            writer.write_row_digests(wave, keys, keys ^ np.uint8(seed))
        store.objects.delete_folder(f"generations/{generation}-draft")
    store.activate("g1")
    basis = store.open_generation().basis
    for number in (1, 2, 3):
        store.put_fresh(make_fresh(f"user-{number}", basis, float(number)))
    store.erase(store.key("user-3"))
    return store


def path_of(store: AdapterStore, name: str) -> str:
    if name.startswith("user-"):
        return names.fresh(store.key(name))
    return names.tombstone(store.key(name.replace("gone", "user"))) if name.startswith("gone-") else name


def asked(store: AdapterStore) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every question to a store that is opened anew, and how to ask it."""
    opened: list[AdapterStore] = []
    readers: dict[str | None, GenerationReader] = {}

    def fresh() -> AdapterStore:
        if not opened:
            opened.append(AdapterStore.open(store.uri))
        return opened[0]

    def pulled(generation: str | None, key: bytes) -> Any:
        if generation not in readers:
            readers[generation] = fresh().open_generation(generation)
        reader = readers[generation]
        found = fresh().pull(reader, key)
        return reader.generation, reader.shared().tensors["B"].tolist(), found and (found.key, found.record.tobytes(), found.version)

    for number in range(8):
        key = store.key(f"user-{number}")
        yield f"served {number}", lambda key=key: pulled(None, key)
        yield f"rolled back {number}", lambda key=key: pulled("g1", key)
        yield f"key {number}", lambda number=number: fresh().key(f"user-{number}")
    yield "begun", lambda: (resumed := fresh().resume("g1")).generation + resumed.version + resumed.kind
    yield "finished", lambda: sorted(fresh().manifest("g1").segments, key=lambda segment: segment.wave)  # type: ignore[union-attr]


def answers(store: AdapterStore) -> Answers:
    """What each question is answered with; a refusal is left out."""
    found: Answers = {}
    for question, ask in asked(store):
        try:
            found[question] = ask()
        except StoreError as error:
            assert "\n" not in str(error)
    return found


def assert_refused_or_as_before(store: AdapterStore, sound: Answers, digests: dict[bytes, bytes], what: str) -> None:
    found = answers(store)
    assert {question: answer for question, answer in found.items() if answer != sound[question]} == {}, what
    assert digests_of(store.objects).items() <= digests.items(), what


def digests_of(objects: ObjectStore) -> dict[bytes, bytes]:
    keys, digests = read_row_digests(objects, "g1")
    return {key.tobytes(): digest.tobytes() for key, digest in zip(keys, digests, strict=True)}


@pytest.mark.parametrize("kind", KINDS)
def test_an_object_that_was_changed_shortened_or_swapped_is_refused_and_no_other_answer_is_given(kept: AdapterStore, kind: str) -> None:
    sound, digests = answers(kept), digests_of(kept.objects)
    assert len(sound) == 26 and len(digests) == 8
    first, second = (name and path_of(kept, name) for name in KINDS[kind])
    assert first is not None
    whole = kept.objects.read(first)
    for number, place in enumerate(sorted({int(step * len(whole) / FLIPS) for step in range(FLIPS)})):
        kept.objects.write(first, whole[:place] + bytes([whole[place] ^ 1 << number % 8]) + whole[place + 1 :])
        assert_refused_or_as_before(kept, sound, digests, f"bit {number % 8} of byte {place} of {len(whole)}")
    for length in (0, 1, 8, len(whole) // 2, len(whole) - 1):
        kept.objects.write(first, whole[:length])
        assert_refused_or_as_before(kept, sound, digests, f"{length} of {len(whole)} bytes")
    kept.objects.write(first, whole + b"\0")
    assert_refused_or_as_before(kept, sound, digests, "one byte more")
    if second is not None:
        kept.objects.write(first, kept.objects.read(second))
        assert_refused_or_as_before(kept, sound, digests, f"{second} in its place")
    kept.objects.write(first, whole)
    assert answers(kept) == sound
