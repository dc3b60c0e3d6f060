"""Retained examples: kept for their time, never past an erasure, never another user's."""

from __future__ import annotations

import time
import uuid

import numpy as np
import pytest

from plora_ray.errors import CorruptObjectError, ErasedDuringFit
from plora_ray.store import AdapterStore, RootKeySource, UserAdapter, names, new_version, retained
from plora_ray.store.fsck import check
from plora_ray.store.retained import MOST_EXAMPLES, Retained, RetainedExamples
from plora_ray.store.traces import traces_of

DAY_S = 86_400


class Backwards:
    """A seal for the test: what is one user's is written from the end, after the user's key."""

    def sealed(self, key: bytes, plain: bytes) -> bytes:
        return key + plain[::-1]

    def opened(self, key: bytes, sealed: bytes, name: str) -> bytes:
        if sealed[:16] != key:
            raise CorruptObjectError(f"{name} is sealed for another user")
        return sealed[16:][::-1]


@pytest.fixture
def store() -> AdapterStore:
    return AdapterStore(f"memory://{uuid.uuid4().hex}")


@pytest.fixture
def encrypted(monkeypatch: pytest.MonkeyPatch) -> AdapterStore:
    monkeypatch.setenv("EXAMPLES_ROOT_KEY", "5a" * 32)
    return AdapterStore(f"memory://{uuid.uuid4().hex}", encryption=RootKeySource(key_env="EXAMPLES_ROOT_KEY"))


@pytest.fixture
def ann(store: AdapterStore) -> bytes:
    return store.key("ann")


def rows(found: Retained) -> list[tuple[str, str | float]]:
    return list(zip(found.texts, found.labels, strict=True))


@pytest.mark.parametrize("seal", [None, Backwards()])
def test_examples_gather_a_text_counts_with_its_newest_label_and_the_seal_covers_all_of_them(
    store: AdapterStore, ann: bytes, seal: Backwards | None
) -> None:
    examples = RetainedExamples(store.objects, 30, seal)
    examples.keep(ann, ["wörds", "more"], ["no", 2.5])
    examples.keep(ann, ["wörds"], ["yes"])
    assert rows(examples.of(ann)) == [("more", 2.5), ("wörds", "yes")] and rows(examples.of(store.key("bob"))) == []
    assert ("more" in store.objects.read(names.examples(ann)).decode("latin-1")) == (seal is None)
    assert traces_of(store, ann).retained_examples == 2 and list(examples.keys()) == [ann]
    assert check(store, lambda done, total: None).problems == []


def test_only_so_many_older_examples_are_kept_and_no_new_one_is_dropped() -> None:
    many = [f"text {number}" for number in range(MOST_EXAMPLES + 5)]
    labels = ["yes"] * len(many)
    assert Retained(["old"], ["no"], [1.0]).joined(many, labels, 2.0).texts == many
    assert Retained(many, labels, [1.0] * len(many)).joined(["x"], ["y"], 2.0).texts == [*many[6:], "x"]


def test_an_example_is_used_for_its_days_and_then_deleted_alone(store: AdapterStore, ann: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    examples, begun = RetainedExamples(store.objects, 30), time.time()
    for day, text in ((0, "first"), (20, "second")):
        monkeypatch.setattr(time, "time", lambda day=day: begun + day * DAY_S)
        examples.keep(ann, [text], ["no"])
    assert examples.expire() == 0 and examples.of(ann).texts == ["first", "second"]
    monkeypatch.setattr(time, "time", lambda: begun + 31 * DAY_S)
    assert examples.of(ann).texts == ["second"], "too old already, though nobody has collected it yet"
    assert examples.expire() == 1 and b"first" not in store.objects.read(names.examples(ann))
    monkeypatch.setattr(time, "time", lambda: begun + 51 * DAY_S)
    assert examples.expire() == 1 and store.objects.list(names.EXAMPLES) == []


def test_an_erasure_takes_the_examples_and_those_that_were_on_their_way_are_refused(
    store: AdapterStore, ann: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = RetainedExamples(store.objects, 30)
    examples.keep(ann, ["before"], ["no"])
    version = store.erase(ann)
    assert store.objects.list(names.EXAMPLES) == [] and traces_of(store, ann).retained_examples == 0
    with pytest.raises(ErasedDuringFit):
        examples.keep(ann, ["late"], ["no"])
    known = iter([version, store.erase(ann)])  # erased again between the look before the write and the one after it
    with monkeypatch.context() as patch:
        patch.setattr(retained, "tombstone_version", lambda objects, key: next(known))
        with pytest.raises(ErasedDuringFit):
            examples.keep(ann, ["between"], ["no"], version)
    assert store.objects.list(names.EXAMPLES) == []


def test_what_a_process_that_ended_too_early_left_of_an_erased_user_is_never_used_and_is_collected(store: AdapterStore, ann: bytes) -> None:
    examples = RetainedExamples(store.objects, 30)
    examples.keep(ann, ["before"], ["no"])
    data = store.objects.read(names.examples(ann))
    version = store.erase(ann)
    store.objects.write(names.examples(ann), data)
    assert examples.of(ann, version).texts == []
    examples.keep(ann, ["back"], ["yes"], version)
    assert examples.of(ann, version).texts == ["back"], "who comes back begins anew"
    store.objects.write(names.examples(ann), data)
    assert examples.expire() == 1 and store.objects.list(names.EXAMPLES) == []


def test_damaged_examples_and_another_users_are_errors(store: AdapterStore, ann: bytes) -> None:
    examples, bob = RetainedExamples(store.objects, 30), store.key("bob")
    examples.keep(ann, ["mine"], ["no"])
    data = store.objects.read(names.examples(ann))
    store.objects.write(names.examples(bob), data)
    with pytest.raises(CorruptObjectError, match="another user's"):
        examples.of(bob)
    assert [problem.path for problem in check(store, lambda done, total: None).problems] == [names.examples(bob)]
    for place in range(0, len(data), 11):
        store.objects.write(names.examples(ann), data[:place] + bytes([data[place] ^ 8]) + data[place + 1 :])
        with pytest.raises(CorruptObjectError):
            examples.of(ann)


def test_in_an_encrypted_store_examples_are_sealed_under_the_users_own_key_and_end_with_it(encrypted: AdapterStore) -> None:
    ann, bob = encrypted.key("ann"), encrypted.key("bob")
    examples = encrypted.retained_examples(30)
    with pytest.raises(ErasedDuringFit):
        examples.keep(ann, ["a text"], ["yes"])  # whoever has no adapter has no data key, and nobody makes one for examples
    for key in (ann, bob):
        encrypted.put_fresh(UserAdapter(key, np.ones(3, np.float32), 1, "g1", new_version(), "now", "fresh", "0" * 64))
        examples.keep(key, ["a secret text"], ["yes"])
    assert rows(examples.of(ann)) == [("a secret text", "yes")]
    stored = encrypted.objects.read(names.examples(ann))
    assert b"secret" not in stored
    _, sealed = retained.decode_examples(stored, "ann")
    seal = encrypted.retained_examples(30)._seal
    assert b"secret" in seal.opened(ann, sealed, "ann")
    with pytest.raises(CorruptObjectError, match="can't be decrypted"):
        seal.opened(bob, sealed, "bob")
    encrypted.erase(ann)
    encrypted.objects.write(names.examples(ann), stored)  # from a backup
    with pytest.raises(CorruptObjectError, match="can't be decrypted"):
        examples.of(ann)
    assert rows(examples.of(bob)) == [("a secret text", "yes")]
