"""Every operation of the store, disturbed at each of its steps: a fresh reader sees the old or the new state, whole.

A backend in memory stops, errs, cuts an answer short or loses it at its n-th call, for every n until the operation gets by.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from plora_ray.adapters.labels import LabelSpace
from plora_ray.errors import StoreError
from plora_ray.store import AdapterStore, ModelRef, UserAdapter, collection, names, new_version, retries
from plora_ray.store.fsck import check
from plora_ray.store.traces import traces_of
from plora_ray.training.compaction import compact
from plora_ray.training.garbage import collect_garbage
from plora_ray.training.run_state import RunState

USERS = [f"user-{number}" for number in range(8)]
WIDTH = 3
State = dict[str, bytes]


class Stopped(BaseException):
    """The process ends here."""


@dataclass
class FaultyBackend:
    """Passes calls on, but for number `at`.

    stop: the process ends before the call; stop after: once it was carried out. error: it fails for good. passing: it fails, and would
    succeed the next time. lost: it is carried out and its answer is lost. short: a read gives the first half of its bytes.
    """

    inner: Any
    fault: str
    at: int
    calls: int = 0
    met: bool = False
    concurrent: bool = False
    dead: bool = field(default=False)

    def __getattr__(self, name: str) -> Any:
        call = getattr(self.inner, name)

        def counted(*arguments: Any) -> Any:
            if self.dead:
                raise Stopped
            self.calls += 1
            if self.calls != self.at + 1:
                return call(*arguments)
            self.met = True
            return self.disturbed(name, lambda: call(*arguments))

        return counted

    def disturbed(self, name: str, call: Callable[[], Any]) -> Any:
        """The call with its fault."""
        if self.fault == "stop":
            self.dead = True
            raise Stopped
        if self.fault == "error":
            raise PermissionError("denied")
        if self.fault == "passing":
            raise ConnectionError("reset")
        answer = call()
        if self.fault == "stop after":
            self.dead = True
            raise Stopped
        if self.fault == "lost":
            raise ConnectionError("reset")
        assert self.fault == "short"
        return answer[: len(answer) // 2] if name == "read" else answer


def publish(store: AdapterStore, generation: str, value: float) -> None:
    """Two waves of four users, whose numbers are `value` plus their place."""
    writer = store.begin(generation)
    writer.write_shared({"B": np.ones(2, np.float32)}, {})
    order = sorted(range(len(USERS)), key=lambda place: store.key(USERS[place]))
    for wave, part in enumerate((order[:4], order[4:])):
        keys = np.frombuffer(b"".join(store.key(USERS[place]) for place in part), np.uint8).reshape(-1, 16)
        records = np.repeat(np.array(part, np.float32)[:, None] + np.float32(value), WIDTH, 1)
        writer.write_row_digests(wave, keys, np.full((len(part), 16), 9, np.uint8))
        writer.write_segment(wave, keys, records, np.full(len(part), 7, np.int32))
    config = {"labels": LabelSpace("classification", ("no", "yes")).to_json()}
    writer.commit(expected_users=len(USERS), model=ModelRef(name="m", weight_hash="0"), adapter_config=config)


def adapt(store: AdapterStore, user: str, value: float) -> None:
    record, basis = np.full(WIDTH, value, np.float32), store.open_generation().basis
    store.put_fresh(UserAdapter(store.key(user), record, 4, "g1", new_version(), "now", "fresh", basis))


def served(store: AdapterStore) -> State:
    """By user, the bytes of the adapter that a fresh reader is given."""
    reader = store.open_generation()
    found = {user: store.pull(reader, store.key(user)) for user in USERS}
    return {user: adapter.record.tobytes() for user, adapter in found.items() if adapter is not None}


def nobody_watches(done: int, users: int) -> None:
    pass


def collect(store: AdapterStore) -> None:
    collection.collect(store, keep=1, grace_s=0)


def collect_erased(store: AdapterStore) -> None:
    """Write the generation anew that holds bytes of an erased user and serves, and delete all others."""
    garbage = collect_garbage(store, keep=1, grace_s=0, on_users=nobody_watches)
    if garbage.left:
        raise StoreError("not all could be written anew")


OPERATIONS: dict[str, Callable[[AdapterStore], object]] = {
    "publish": lambda store: publish(store, "g3", 300.0),
    "adapt": lambda store: adapt(store, USERS[5], 500.0),
    "compact": lambda store: compact(store, nobody_watches),
    "erase": lambda store: store.erase(store.key(USERS[1])),
    "gc": collect,
    "gc of erased": collect_erased,
    "rollback": lambda store: store.activate("g1"),
}


def prepared() -> AdapterStore:
    """Two generations of the same shared weights, two users adapted since and one erased."""
    store = AdapterStore(f"memory://{uuid.uuid4().hex}")
    publish(store, "g1", 100.0)
    publish(store, "g2", 200.0)
    adapt(store, USERS[1], 401.0)
    adapt(store, USERS[2], 402.0)
    store.erase(store.key(USERS[3]))
    return store


def disturbed_runs(operation: Callable[[AdapterStore], object], fault: str) -> Iterator[tuple[AdapterStore, bool]]:
    """The store and whether the operation was acknowledged, for a fault at each of its calls; ends when it gets by without one."""
    for at in itertools.count():
        store = prepared()
        faulty = AdapterStore(store.uri)
        faulty.objects._backend = backend = FaultyBackend(faulty.objects._backend, fault, at)  # type: ignore[assignment]
        try:
            operation(faulty)
            acknowledged = True
        except (Stopped, StoreError):
            acknowledged = False
        if not backend.met:
            assert acknowledged and at > 0
            return
        yield AdapterStore(store.uri), acknowledged


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.0001)


@pytest.mark.parametrize("fault", ["stop", "stop after", "error", "passing", "lost", "short"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_fault_at_any_step_leaves_the_old_or_the_new_state_whole_and_the_operation_typed_again_ends_it(name: str, fault: str) -> None:
    operation = OPERATIONS[name]
    old, undisturbed = served(prepared()), prepared()
    operation(undisturbed)
    new = served(undisturbed)
    for store, acknowledged in disturbed_runs(operation, fault):
        state = served(store)
        assert state in ((new,) if acknowledged else (old, new))
        assert acknowledged or fault not in ("passing", "lost"), "what passes is ridden out"
        if name == "publish" and store.manifest("g3") is not None:
            store.activate("g3")  # published by the disturbed attempt; what may be left is to make it serve
        else:
            operation(store)
        assert served(store) == new
        found = check(store, nobody_watches)
        assert found.problems == [] and found.unknown == []
        if name == "compact":
            assert store.objects.list("runs") == []
        if name == "gc of erased":
            left = traces_of(store, store.key(USERS[3]))
            assert (left.records, left.row_digests, left.unfinished, len(store.generations())) == ([], [], [], 1)
        if name == "gc":
            assert [info.generation for info in store.generations()] == ["g2"] == store.objects.folders(names.GENERATIONS)


def test_two_compactions_at_once_make_one_generation_and_lose_nothing() -> None:
    store = prepared()
    before, other = served(store), AdapterStore(store.uri)
    done: list[Any] = []

    def meanwhile(written: int, users: int) -> None:
        if not done:
            done.append(None)
            done[0] = compact(other, nobody_watches)

    try:
        done.append(compact(store, meanwhile))
    except StoreError as error:
        assert "another writer" in str(error) or "was never begun" in str(error) or "doesn't exist" in str(error)
    assert served(AdapterStore(store.uri)) == before and store.current() == done[0].generation
    assert RunState(store.objects, "none").head() is None and check(store, nobody_watches).problems == []
