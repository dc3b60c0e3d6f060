"""Every operation of the store, disturbed at each of its steps: a fresh reader sees the old or the new state, whole.

A backend in memory stops, errs, cuts an answer short or loses it at its n-th call, for every n until the operation gets by; in a plain
and in an encrypted store.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from plora_ray.errors import StoreError
from plora_ray.store import AdapterStore, collection, names, retries
from plora_ray.store.fsck import check
from plora_ray.store.traces import traces_of
from plora_ray.store.transfer import copy_generation, open_target
from plora_ray.training.compaction import compact
from plora_ray.training.garbage import collect_garbage
from plora_ray.training.run_state import RunState
from tests.chaos.small_store import ROOT_KEY_VARIABLE, USERS, adapt, nobody_watches, opened, prepared, publish, served


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


def disturbed_runs(operation: Callable[[AdapterStore], object], fault: str, kind: str) -> Iterator[tuple[AdapterStore, bool]]:
    """The store and whether the operation was acknowledged, for a fault at each of its calls; ends when it gets by without one."""
    for at in itertools.count():
        store = prepared(kind=kind)
        faulty = opened(store.uri)
        faulty.objects._backend = backend = FaultyBackend(faulty.objects._backend, fault, at)  # type: ignore[assignment]
        try:
            operation(faulty)
            acknowledged = True
        except (Stopped, StoreError):
            acknowledged = False
        if not backend.met:
            assert acknowledged and at > 0
            return
        yield opened(store.uri), acknowledged


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.0001)
    monkeypatch.setenv(ROOT_KEY_VARIABLE, "7e" * 32)


@pytest.mark.parametrize("fault", ["stop", "stop after", "error", "passing", "lost", "short"])
@pytest.mark.parametrize("kind", ["plain", "encrypted"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_fault_at_any_step_leaves_the_old_or_the_new_state_whole_and_the_operation_typed_again_ends_it(
    name: str, kind: str, fault: str
) -> None:
    operation = OPERATIONS[name]
    old, undisturbed = served(prepared(kind=kind)), prepared(kind=kind)
    operation(undisturbed)
    new = served(undisturbed)
    for store, acknowledged in disturbed_runs(operation, fault, kind):
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
        if kind == "encrypted" and name == "erase":
            assert store.keys is not None and not store.keys.has(store.key(USERS[1]))
        if name == "compact":
            assert store.objects.list("runs") == []
        if name == "gc of erased":
            left = traces_of(store, store.key(USERS[3]))
            assert (left.records, left.row_digests, left.unfinished, len(store.generations())) == ([], [], [], 1)
        if name == "gc":
            assert [info.generation for info in store.generations()] == ["g2"] == store.objects.folders(names.GENERATIONS)


@pytest.mark.parametrize("kind", ["plain", "encrypted"])
def test_two_compactions_at_once_make_one_generation_and_lose_nothing(kind: str) -> None:
    store = prepared(kind=kind)
    before, other = served(store), opened(store.uri)
    done: list[Any] = []

    def meanwhile(written: int, users: int) -> None:
        if not done:
            done.append(None)
            done[0] = compact(other, nobody_watches)

    try:
        done.append(compact(store, meanwhile))
    except StoreError as error:
        assert "another writer" in str(error) or "was never begun" in str(error) or "doesn't exist" in str(error)
    assert served(opened(store.uri)) == before and store.current() == done[0].generation
    assert RunState(store.objects, "none").head() is None and check(store, nobody_watches).problems == []


@pytest.mark.parametrize("fault", ["stop", "stop after", "error", "passing", "lost", "short"])
@pytest.mark.parametrize("side", ["source", "target"])
def test_a_copy_disturbed_at_any_step_on_either_side_is_whole_or_no_generation_and_typed_again_ends(side: str, fault: str) -> None:
    for at in itertools.count():
        source = prepared()
        target = open_target(source, f"{source.uri}-copy")
        faulty = AdapterStore(source.uri if side == "source" else target.uri)
        faulty.objects._backend = backend = FaultyBackend(faulty.objects._backend, fault, at)  # type: ignore[assignment]
        sides = (faulty, target) if side == "source" else (source, faulty)
        try:
            copy_generation(sides[0], "g2", sides[1], nobody_watches)
            acknowledged = True
        except (Stopped, StoreError):
            acknowledged = False
        assert acknowledged or (backend.met and fault not in ("passing", "lost"))
        fresh = AdapterStore(target.uri)
        assert not acknowledged or fresh.manifest("g2") is not None
        if fresh.manifest("g2") is not None:
            fresh.activate("g2")
            assert served(fresh) == served(source)
        copy_generation(source, "g2", fresh, nobody_watches)
        fresh.activate("g2")
        found = check(fresh, nobody_watches)
        assert served(fresh) == served(source) and found.problems == [] and found.unknown == []
        if not backend.met:
            return
