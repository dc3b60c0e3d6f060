"""A real S3 server, killed and started again while it writes: no acknowledged adapter is lost, nobody sees half of anything."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from cluster.s3_server import S3Server
from plora_ray.store import AdapterStore, s3_multipart
from plora_ray.store.fsck import check
from tests.chaos.small_store import USERS, adapt, nobody_watches, prepared, publish, served

WIDTH = 600_000  # a segment of four users is 9.6 MB, so that a kill finds it on its way
OPERATIONS: dict[str, Callable[[AdapterStore], object]] = {
    "publish": lambda store: publish(store, "g3", 300.0, WIDTH),
    "adapt": lambda store: adapt(store, USERS[5], 500.0, WIDTH),
    "erase": lambda store: store.erase(store.key(USERS[1])),
}
WRITES = ("create", "write", "replace_if")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        server.create_bucket("adapters")
        yield server


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of these tests go in parts, too."""
    monkeypatch.setattr(s3_multipart, "PART_BYTES", 5 * 2**20)
    monkeypatch.setattr(s3_multipart, "MIN_BYTES", 6 * 2**20)


class WatchedBackend:
    """Passes calls on. writes: how many have begun; `reached` is set as number `at` begins."""

    def __init__(self, inner: Any, at: int = -1) -> None:
        self.inner, self.at, self.writes = inner, at, 0
        self.reached = threading.Event()

    def __getattr__(self, name: str) -> Any:
        call = getattr(self.inner, name)
        if name not in WRITES:
            return call

        def watched(*arguments: Any) -> Any:
            self.writes += 1
            if self.writes == self.at + 1:
                self.reached.set()
            return call(*arguments)

        return watched


def place(server: S3Server) -> tuple[str, dict[str, Any]]:
    return f"s3://adapters/{uuid.uuid4().hex}", server.storage_options


def watched(store: AdapterStore, at: int = -1) -> tuple[AdapterStore, WatchedBackend]:
    patient = AdapterStore(store.uri, store.objects.storage_options, retry_s=120)
    patient.objects._backend = backend = WatchedBackend(patient.objects._backend, at)  # type: ignore[assignment]
    return patient, backend


def kill_during(server: S3Server, name: str, at: int) -> None:
    """Kill the server as write number `at` of the operation is on its way."""
    store = prepared(*place(server), WIDTH)
    old = served(store)
    patient, backend = watched(store, at)
    with ThreadPoolExecutor(1) as worker:
        running = worker.submit(OPERATIONS[name], patient)
        assert backend.reached.wait(60)
        server.kill()
        server.start()
        fresh = AdapterStore.open(store.uri, store.objects.storage_options, retry_s=60)
        between = served(fresh)
        running.result(timeout=240)  # acknowledged: the outage was ridden out
    new = served(fresh := AdapterStore.open(store.uri, store.objects.storage_options))
    assert new == expected(name, old) and between in (old, new)
    found = check(fresh, nobody_watches)
    assert found.problems == [] and found.unknown == []
    fresh.objects.abort_uploads(0)


def expected(name: str, old: dict[str, bytes]) -> dict[str, bytes]:
    """What is served once the operation was acknowledged, by the same operation in memory."""
    store = prepared(width=WIDTH)
    assert served(store) == old
    OPERATIONS[name](store)
    return served(store)


@pytest.mark.parametrize(("name", "at"), [("publish", 2), ("adapt", 0), ("erase", 1)])
def test_a_server_killed_in_the_middle_of_a_write_costs_nothing_that_was_acknowledged(server: S3Server, name: str, at: int) -> None:
    kill_during(server, name, at)


@pytest.mark.chaos
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_server_killed_at_every_write_costs_nothing_that_was_acknowledged(server: S3Server, name: str) -> None:
    undisturbed, backend = watched(prepared(*place(server), WIDTH))
    OPERATIONS[name](undisturbed)
    assert backend.writes > 0
    for at in range(backend.writes):
        for _ in range(3):
            kill_during(server, name, at)
