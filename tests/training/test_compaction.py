"""Compaction: the next generation holds what was served before it, less who was erased, whatever happens on the way."""

from __future__ import annotations

import uuid
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plora_ray.adapters.labels import LabelSpace
from plora_ray.store import AdapterStore, GenerationWriter, ModelRef, UserAdapter, names, new_version
from plora_ray.store.objects import ObjectStore
from plora_ray.training import compaction
from plora_ray.training.compaction import compact

WIDTH = 3


def nobody_watches(done: int, users: int) -> None:
    assert done <= users


def publish(store: AdapterStore, users: list[str]) -> None:
    """The generation `base`: user n's numbers are all n."""
    writer = store.begin("base")
    writer.write_shared({"B": np.ones(2, np.float32)}, {})
    order = sorted(range(len(users)), key=lambda place: store.key(users[place]))
    for wave, part in enumerate(np.array_split(order, 3)):
        if len(part):
            keys = np.frombuffer(b"".join(store.key(users[place]) for place in part), np.uint8).reshape(-1, 16)
            writer.write_segment(wave, keys, np.repeat(part[:, None], WIDTH, 1).astype(np.float32), np.full(len(part), 7, np.int32))
    config = {"labels": LabelSpace("classification", ("no", "yes")).to_json()}
    writer.commit(expected_users=len(users), model=ModelRef(name="m", weight_hash="0"), adapter_config=config)


def adapt(store: AdapterStore, user: str, value: float, version: str | None = None) -> None:
    basis = store.open_generation().basis
    record = np.full(WIDTH, value, np.float32)
    store.put_fresh(UserAdapter(store.key(user), record, 4, "base", version or new_version(), "now", "fresh", basis))


def served(store: AdapterStore, users: list[str]) -> dict[str, float]:
    """What each user is served: its adapter's first number."""
    reader = store.open_generation()
    found = {user: store.pull(reader, store.key(user)) for user in users}
    return {user: float(adapter.record[0]) for user, adapter in found.items() if adapter is not None}


NAMES = [f"user-{number}" for number in range(14)]


@settings(max_examples=40, deadline=None)
@given(
    trained=st.sets(st.sampled_from(NAMES[:10]), min_size=1), adapted=st.lists(st.sampled_from(NAMES), max_size=8),
    erased=st.sets(st.sampled_from(NAMES), max_size=5),
)  # fmt: skip
def test_every_user_is_served_the_same_after_a_compaction_and_its_segments_alone_hold_everybody_but_the_erased(
    trained: set[str], adapted: list[str], erased: set[str]
) -> None:
    store = AdapterStore(f"memory://{uuid.uuid4().hex}")
    publish(store, sorted(trained))
    for place, user in enumerate(adapted):
        adapt(store, user, 100 + place)
    for user in erased:
        store.erase(store.key(user))
    before = served(store, NAMES)
    done = compact(store, nobody_watches)
    assert served(store, NAMES) == before
    reader = store.open_generation()
    assert done.changed == bool(set(adapted) - erased or trained & erased)
    assert (done.folded, done.dropped) == ((len(set(adapted) - erased), len(trained & erased)) if done.changed else (0, 0))
    assert done.generation == reader.generation == store.current() and done.users == reader.users
    if done.changed:
        assert reader.users == len(before) and reader.basis == store.open_generation("base").basis
        assert {user: float(reader.get_many([store.key(user)])[store.key(user)].record[0]) for user in before} == before
        again = compact(store, nobody_watches)
        assert not again.changed and again.generation == done.generation
    assert store.objects.list("runs") == [] and len(store.objects.folders(names.GENERATIONS)) == 1 + done.changed


class Stopped(BaseException):
    """The process ends here."""


def stopped_after(writes: int, store: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Compact in a process that ends at its write number `writes`; whether it came so far."""
    left = writes

    def stopping(write: Callable[..., object]) -> Callable[..., object]:
        def counted(*arguments: object, **more: object) -> object:
            nonlocal left
            if not left:
                raise Stopped
            left -= 1
            return write(*arguments, **more)

        return counted

    with monkeypatch.context() as patch:
        for name in ("write", "create", "update", "delete", "delete_folder"):
            patch.setattr(ObjectStore, name, stopping(getattr(ObjectStore, name)))
        try:
            compact(AdapterStore(store.uri), nobody_watches)
        except Stopped:
            return True
    return False


def test_a_compaction_stopped_at_any_write_is_finished_by_the_next_and_nobody_is_served_anything_else_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compaction, "MAX_USERS_PER_WAVE", 4)
    writes, stopped = 0, True
    while stopped:
        store = AdapterStore(f"memory://{uuid.uuid4().hex}")
        publish(store, NAMES[:10])
        for place, user in enumerate(NAMES[4:12]):
            adapt(store, user, 100 + place)
        store.erase(store.key(NAMES[0]))
        before = served(store, NAMES)
        stopped = stopped_after(writes, store, monkeypatch)
        later = AdapterStore(store.uri)
        assert served(later, NAMES) == before
        done = compact(later, nobody_watches)
        reader = later.open_generation()
        assert served(later, NAMES) == before and reader.users == len(before) and done.generation == reader.generation
        assert later.objects.list("runs") == []
        assert len(later.generations()) == 2 == len(later.objects.folders(names.GENERATIONS)), "nothing half-made is left"
        writes += 1
    assert writes > 15


def test_an_adapter_stored_and_a_user_erased_while_a_compaction_runs_are_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    store = AdapterStore(f"memory://{uuid.uuid4().hex}")
    publish(store, NAMES[:10])
    adapt(store, NAMES[0], 100)
    commit = GenerationWriter.commit

    def meanwhile(self: GenerationWriter, **arguments: object) -> object:
        adapt(store, NAMES[1], 200, version="00000000000000000001-00000000")  # by a machine whose clock is behind
        adapt(store, NAMES[2], 300)
        store.erase(store.key(NAMES[3]))
        return commit(self, **arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(GenerationWriter, "commit", meanwhile)
    done = compact(store, nobody_watches)
    found = served(store, NAMES)
    assert done.active and (found[NAMES[0]], found[NAMES[1]], found[NAMES[2]]) == (100, 200, 300) and NAMES[3] not in found


def test_a_compaction_whose_base_was_replaced_meanwhile_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    store = AdapterStore(f"memory://{uuid.uuid4().hex}")
    publish(store, NAMES[:4])
    adapt(store, NAMES[0], 100)
    writer = store.begin("trained-meanwhile")
    writer.write_shared({"B": np.zeros(2, np.float32)}, {})
    writer.commit(expected_users=0, model=ModelRef(name="m", weight_hash="0"), adapter_config={}, activate=False)

    def told(done: int, users: int) -> None:
        store.activate("trained-meanwhile")

    done = compact(store, told)
    assert not done.active and done.generation != store.current() == "trained-meanwhile"
