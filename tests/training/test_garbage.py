"""Garbage collection: what erased users left goes, what anybody else is served stays, now and after a rollback."""

from __future__ import annotations

import datetime
import time
import uuid

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plora_ray.adapters.labels import LabelSpace
from plora_ray.config import RetentionSettings
from plora_ray.errors import StoreError
from plora_ray.store import AdapterStore, ModelRef, UserAdapter, names, new_version, unused, uses
from plora_ray.store.traces import traces_of
from plora_ray.training import garbage
from plora_ray.training.garbage import Garbage, collect_garbage
from plora_ray.training.run_state import RunState
from plora_ray.training.runs import ALIVE_S

WIDTH = 3
NAMES = [f"user-{number}" for number in range(9)]


def publish(store: AdapterStore, generation: str, users: list[str], value: float, shared: float = 1.0) -> None:
    """A generation in two waves: every number of the user NAMES[n] is `value` + n."""
    writer = store.begin(generation)
    writer.write_shared({"B": np.full(2, shared, np.float32)}, {})
    order = sorted(range(len(users)), key=lambda place: store.key(users[place]))
    for wave, part in enumerate(np.array_split(order, 2)):
        if len(part):
            keys = np.frombuffer(b"".join(store.key(users[place]) for place in part), np.uint8).reshape(-1, 16)
            numbers = np.array([value + NAMES.index(users[place]) for place in part], np.float32)
            writer.write_row_digests(wave, keys, keys)
            writer.write_segment(wave, keys, np.repeat(numbers[:, None], WIDTH, 1), np.full(len(part), 7, np.int32))
    config = {"labels": LabelSpace("classification", ("no", "yes")).to_json()}
    model, day = ModelRef(name="m", weight_hash="0"), f"2026-01-01T00:00:{int(value) // 100:02d}.000+00:00"
    writer.commit(expected_users=len(users), model=model, adapter_config=config, created_at=day)


def adapt(store: AdapterStore, user: str, value: float) -> None:
    record, basis = np.full(WIDTH, value, np.float32), store.open_generation().basis
    store.put_fresh(UserAdapter(store.key(user), record, 4, "g", new_version(), "now", "fresh", basis))


def served(store: AdapterStore, generation: str | None = None) -> dict[str, float]:
    reader = store.open_generation(generation)
    found = {user: store.pull(reader, store.key(user)) for user in NAMES}
    return {user: float(adapter.record[0]) for user, adapter in found.items() if adapter is not None}


def collected(
    store: AdapterStore, keep: int = 3, grace_s: float = 0.0, dry_run: bool = False, unused_days: int | None = None
) -> Garbage:
    return collect_garbage(
        store, keep=keep, grace_s=grace_s, dry_run=dry_run, retention=RetentionSettings(unused_adapters_days=unused_days),
        on_users=lambda done, users: None,
    )  # fmt: skip


@pytest.fixture
def store() -> AdapterStore:
    """Three generations of everybody, the first of other shared weights; one user adapted since, one erased, one erased and back."""
    store = AdapterStore(f"memory://{uuid.uuid4().hex}")
    for number, name in enumerate(("g1", "g2", "g3"), 1):
        publish(store, name, NAMES, 100.0 * number, shared=float(number > 1))
    adapt(store, NAMES[0], 900)
    for user in NAMES[1:3]:
        store.erase(store.key(user))
    adapt(store, NAMES[2], 902)
    return store


def traces(store: AdapterStore) -> list[str]:
    """Published generations that hold a byte of the erased, whether they came back or not."""
    found = [traces_of(store, store.key(user)) for user in NAMES[1:3]]
    return sorted({name for trace in found for name in (*trace.records, *trace.row_digests)})


@settings(max_examples=30, deadline=None)
@given(
    trained=st.lists(st.sets(st.sampled_from(NAMES), min_size=1), min_size=1, max_size=4),
    adapted=st.lists(st.sampled_from(NAMES), max_size=4), erased=st.sets(st.sampled_from(NAMES), max_size=4), keep=st.integers(1, 4),
    data=st.data(),
)  # fmt: skip
def test_whatever_was_published_adapted_and_erased_no_byte_of_the_erased_is_left_and_every_kept_generation_serves_what_it_did(
    trained: list[set[str]], adapted: list[str], erased: set[str], keep: int, data: st.DataObject
) -> None:
    store = AdapterStore(f"memory://{uuid.uuid4().hex}")
    for number, users in enumerate(trained):
        publish(store, f"g{number}", sorted(users), 100.0 * number, shared=float(data.draw(st.booleans())))
    for place, user in enumerate(adapted):
        adapt(store, user, 900.0 + place)
    for user in erased:
        store.erase(store.key(user))
    store.activate(data.draw(st.sampled_from([info.generation for info in store.generations()])))
    before = [info.generation for info in store.generations()]
    kept = [name for place, name in enumerate(before) if place >= len(before) - keep or name == store.current()]
    expected = [served(store, name) for name in kept]
    now = served(store)
    said = collected(store, keep, dry_run=True)
    done = collected(store, keep)
    assert served(store) == now and [served(store, info.generation) for info in store.generations()] == expected
    assert [item.generation for item in said.rewritten] == [item.generation for item in done.rewritten]
    assert [item.generation for item in said.deleted] == [item.generation for item in done.deleted] and not done.left
    for user in erased:
        left = traces_of(store, store.key(user))
        assert (left.records, left.row_digests, left.fresh_adapter, left.unfinished) == ([], [], False, [])
    assert len(store.generations()) == len(store.objects.folders(names.GENERATIONS)) == len(kept)
    again = collected(store, keep)
    assert (again.rewritten, again.deleted, again.left) == ([], [], {})


def test_a_dry_run_changes_nothing(store: AdapterStore) -> None:
    before = store.objects.list()
    said = collected(store, dry_run=True)
    assert [(item.generation, item.erased.records, item.erased.row_digests) for item in said.rewritten] == [
        ("g3", 2, 2), ("g2", 2, 2), ("g1", 2, 2),
    ]  # fmt: skip
    assert {item.generation for item in said.deleted} == {"g1", "g2", "g3"} and store.objects.list() == before


def test_the_old_bytes_stay_for_the_grace_time_after_they_were_replaced_and_are_not_replaced_twice(
    store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = collected(store, grace_s=5000)
    assert len(first.rewritten) == 3 and first.deleted == [] and set(first.left) == {"g1", "g2", "g3"}
    assert traces(store) == ["g1", "g2", "g3"] and store.current() == first.rewritten[0].by
    assert served(store, "g3") == served(store), "a reader that has the old generation open goes on"
    second = collected(store, grace_s=5000)
    assert second.rewritten == [] == second.deleted and set(second.left) == {"g1", "g2", "g3"}
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + 5001)
    last = collected(store, grace_s=5000)
    assert {item.generation for item in last.deleted} == {"g1", "g2", "g3"} and not last.left and traces(store) == []
    assert [served(store, info.generation)[NAMES[3]] for info in store.generations()] == [103, 203, 303], "in the order of their ages"


def test_a_generation_that_a_job_starts_from_is_left_until_the_job_is_done(store: AdapterStore) -> None:
    run = RunState(store.objects, "training")
    run.begin("g3")
    done = collected(store)
    assert "a job" in done.left["g3"] and traces(store) == ["g3"] and store.current() == "g3"
    run.delete()
    assert not collected(store).left and traces(store) == []


def test_a_given_up_compaction_is_no_job_that_needs_its_base(store: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(RunState, "delete", lambda self: (_ for _ in ()).throw(StoreError("stopped")))
        stopped = collected(store)
        assert stopped.failed and "stopped" in stopped.left["g3"]
    assert served(store)[NAMES[0]] == 900
    assert not collected(store).left and traces(store) == [] and store.objects.list("runs") == []


def test_a_rollback_to_a_replaced_generation_is_honoured_and_its_erased_bytes_go_all_the_same(store: AdapterStore) -> None:
    collected(store, grace_s=5000)
    store.activate("g2")
    before = served(store)
    done = collected(store)
    assert served(store) == before and store.current() not in ("g2", "g3") and traces(store) == [] and not done.left
    assert [served(store, info.generation)[NAMES[3]] for info in store.generations()] == [103, 203, 303]


def test_a_damaged_generation_is_named_and_keeps_nothing_else_from_being_collected(store: AdapterStore) -> None:
    reader = store.open_generation("g2")
    place = reader.record_range(reader.lookup(store.key(NAMES[4])))  # type: ignore[arg-type]  # of somebody who wasn't erased
    data = bytearray(store.objects.read(place.path))
    data[place.start] ^= 1  # type: ignore[index]
    store.objects.write(place.path, bytes(data))
    done = collected(store)
    assert done.failed and "g2" in done.left and traces(store) == ["g2"] and len(done.rewritten) == 2


def test_unused_adapters_leave_what_serves_without_a_tombstone_and_come_back_by_examples(
    store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "unused adapters" in collected(store, unused_days=30).left
    now, now_ns = time.time, time.time_ns
    monkeypatch.setattr(time, "time", lambda: now() + 31 * 86_400)
    monkeypatch.setattr(time, "time_ns", lambda: now_ns() + 31 * 86_400 * 10**9)
    for module in (uses, unused, garbage):
        monkeypatch.setattr(module, "today", lambda: datetime.datetime.fromtimestamp(time.time(), datetime.UTC).date())
    uses.write_uses(store.objects, [store.key(user) for user in NAMES[3:6]], uses.today())
    before, erased = served(store), store.tombstones()
    adapt(store, NAMES[6], 906)
    done = collected(store, unused_days=30)
    assert [(again.erased.any, again.unused) for again in done.rewritten] == [(False, 3)] and done.forgotten == 2 and not done.left
    kept = {user: before[user] for user in NAMES[3:6]} | {NAMES[6]: 906}
    assert served(store) == kept and store.tombstones() == erased and store.open_generation().users == 4
    assert [info.users for info in store.generations()] == [7, 7, 4], "what it stood in for is gone, too"
    adapt(store, NAMES[8], 908)
    assert served(store) == {**kept, NAMES[8]: 908}
    again = collected(store, unused_days=30)
    assert (again.rewritten, again.forgotten, again.deleted, again.left) == ([], 0, [], {})


def test_users_erased_again_and_again_leave_one_generation_in_each_place(store: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, ahead = time.time, 0.0
    monkeypatch.setattr(time, "time", lambda: clock() + ahead)
    monkeypatch.setattr(garbage, "delete_abandoned_runs", lambda *_, **__: garbage.RunsLeft())
    for user in NAMES[3:7]:
        store.erase(store.key(user))
        collected(store, grace_s=ALIVE_S)
        ahead += ALIVE_S * 0.7
    ahead += ALIVE_S
    collected(store, grace_s=ALIVE_S)
    assert [served(store, info.generation)[NAMES[7]] for info in store.generations()] == [107, 207, 307] and traces(store) == []


def test_while_a_canary_runs_both_its_generations_stay_as_they_are_and_it_goes_on(store: AdapterStore) -> None:
    store.set_canary("g2", 0.5)
    found = collected(store)
    assert store.canary() is not None and store.current() == "g3" and {"g2", "g3"} <= found.left.keys()
    assert {info.generation for info in store.generations()} >= {"g2", "g3"} and {"g2", "g3"} <= set(traces(store))
    store.set_canary("g2", 0.0)
    before = served(store)
    collected(store)
    assert not {"g2", "g3"} & set(traces(store)) and served(store) == before
