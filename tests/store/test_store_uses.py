"""Uses by the day: what one process notes isn't lost by another's writing, and nobody is called unused before it can be known."""

from __future__ import annotations

import datetime
import time
import uuid
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plora_ray.errors import CorruptObjectError
from plora_ray.store import AdapterStore, ModelRef, UserAdapter, new_version, unused, uses
from plora_ray.store.fsck import check
from plora_ray.store.objects import ObjectStore
from plora_ray.store.retained import RetainedExamples
from plora_ray.store.unused import forget_unused, unused_users
from plora_ray.store.uses import decode_uses, fold_uses, read_uses, write_uses

DAY = datetime.date(2026, 3, 1)
USERS = st.sets(st.integers(0, 30), max_size=6)


def key(number: int) -> bytes:
    return bytes([number * 8]) * 16


class Clock:
    """Days pass for every part of the store."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.days = 0
        now, now_ns = time.time, time.time_ns
        monkeypatch.setattr(time, "time", lambda: now() + self.days * 86_400)
        monkeypatch.setattr(time, "time_ns", lambda: now_ns() + self.days * 86_400 * 10**9)
        for module in (uses, unused):
            monkeypatch.setattr(module, "today", lambda: datetime.datetime.fromtimestamp(time.time(), datetime.UTC).date())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@settings(max_examples=50, deadline=None)
@given(noted=st.lists(st.tuples(st.integers(0, 6), USERS), max_size=12), first=st.integers(0, 6))
def test_folding_keeps_every_use_of_the_days_that_count_and_leaves_one_object_of_a_day_that_is_over(
    noted: list[tuple[int, set[int]]], first: int
) -> None:
    objects = ObjectStore(f"memory://{uuid.uuid4().hex}")
    for day, users in noted:
        write_uses(objects, [key(user) for user in users], DAY + datetime.timedelta(days=day))
    expected = sorted({key(user) for day, users in noted if day >= first for user in users})
    since = DAY + datetime.timedelta(days=first)
    assert [row.tobytes() for row in read_uses(objects, since)] == expected
    fold_uses(objects, since)
    assert [row.tobytes() for row in read_uses(objects, DAY)] == expected
    assert len(objects.list("used")) == len({day for day, users in noted if users and day >= first})


def test_today_and_yesterday_are_not_folded_because_others_may_still_write(clock: Clock) -> None:
    objects = ObjectStore(f"memory://{uuid.uuid4().hex}")
    for back in (0, 1, 2):
        for number in (1, 2):
            write_uses(objects, [key(number)], uses.today() - datetime.timedelta(days=back))
    fold_uses(objects, uses.today() - datetime.timedelta(days=9))
    assert len(objects.list("used")) == 2 + 2 + 1


def test_a_damaged_object_is_an_error_and_never_other_users() -> None:
    data = uses.encode_uses(np.frombuffer(key(1) + key(2), np.uint8))
    assert [row.tobytes() for row in decode_uses(data, "x")] == [key(1), key(2)]
    for place in range(0, len(data), 7):
        with pytest.raises(CorruptObjectError):
            decode_uses(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :], "x")
    with pytest.raises(CorruptObjectError):
        decode_uses(data[:-16], "x")


def adapt(store: AdapterStore, user: str) -> UserAdapter:
    basis = store.open_generation().basis
    adapter = UserAdapter(store.key(user), np.ones(3, np.float32), 4, "g1", new_version(), "now", "fresh", basis)
    store.put_fresh(adapter)
    return adapter


@pytest.fixture
def trained(clock: Clock) -> AdapterStore:
    """A generation of three users, and uses written down from its day on."""
    store = AdapterStore(f"memory://{uuid.uuid4().hex}")
    writer = store.begin("g1")
    writer.write_shared({"B": np.ones(2, np.float32)}, {})
    keys = np.frombuffer(b"".join(sorted(store.key(user) for user in ("idle", "served", "both"))), np.uint8).reshape(-1, 16)
    writer.write_segment(0, keys, np.ones((3, 3), np.float32), np.ones(3, np.int32))
    writer.commit(expected_users=3, model=ModelRef(name="m", weight_hash="0"), adapter_config={})
    return store


def names_of(store: AdapterStore, keys: frozenset[bytes]) -> set[str]:
    return {user for user in ("idle", "served", "both", "left", "adapted") if store.key(user) in keys}


def test_nobody_is_unused_before_uses_were_written_down_for_the_whole_time(trained: AdapterStore, clock: Clock) -> None:
    assert "are written down since" in str(unused_users(trained, 30).not_yet)
    clock.days = 29
    write_uses(trained.objects, [trained.key("served")], uses.today())
    assert unused_users(trained, 30).not_yet is not None and not unused_users(trained, 30).keys
    clock.days = 30
    assert names_of(trained, unused_users(trained, 30).keys) == {"idle", "both"} and unused_users(trained, 30).not_yet is None


def test_nobody_is_unused_if_no_server_writes_uses_down(trained: AdapterStore, clock: Clock) -> None:
    unused_users(trained, 30)
    clock.days = 31
    assert "where it serves" in str(unused_users(trained, 30).not_yet) and not unused_users(trained, 30).keys


def test_unused_fresh_adapters_go_and_those_of_users_who_were_served_or_adapted_since_stay(trained: AdapterStore, clock: Clock) -> None:
    unused_users(trained, 30)
    for user in ("left", "served", "adapted", "both"):
        adapt(trained, user)
    erased = trained.erase(trained.key("left"))
    adapt(trained, "left")
    clock.days = 31
    write_uses(trained.objects, [trained.key("served")], uses.today())
    newer = adapt(trained, "adapted")
    found = unused_users(trained, 30)
    assert names_of(trained, found.keys) == {"idle", "left", "both"}
    meanwhile = adapt(trained, "left")
    assert forget_unused(trained, found) == 0, "one was adapted meanwhile, the other's older adapter would serve in its place"
    fresh = trained.get_fresh(trained.key("left"))
    assert fresh is not None and fresh.version == meanwhile.version
    clock.days = 62
    write_uses(trained.objects, [trained.key("served")], uses.today())
    assert forget_unused(trained, unused_users(trained, 30)) == 2
    assert trained.get_fresh(trained.key("left")) is None is trained.get_fresh(newer.key)
    assert trained.tombstones() == {trained.key("left"): erased}, "an erasure stays noted, nobody else is erased"
    assert adapt(trained, "adapted").version == trained.get_fresh(newer.key).version  # type: ignore[union-attr]
    found_problems = check(trained, lambda done, total: None)
    assert found_problems.problems == [] == found_problems.unknown


def test_uses_and_examples_are_kept_folded_and_deleted_in_every_kind_of_store(place: tuple[str, dict[str, Any] | None]) -> None:
    store = AdapterStore(*place)
    long_ago = uses.today() - datetime.timedelta(days=9)
    for number in (1, 2, 1):
        write_uses(store.objects, [key(number)], long_ago)
    fold_uses(store.objects, long_ago)
    assert len(store.objects.list("used")) == 1 and [row.tobytes() for row in read_uses(store.objects, long_ago)] == [key(1), key(2)]
    fold_uses(store.objects, uses.today())
    examples = RetainedExamples(store.objects, 30)
    examples.keep(store.key("ann"), ["a text"], ["no"])
    examples.keep(store.key("ann"), ["another"], ["yes"])
    assert examples.of(store.key("ann")).texts == ["a text", "another"] and store.objects.list("used") == []
    store.erase(store.key("ann"))
    assert store.objects.list("examples") == [] and examples.expire() == 0
