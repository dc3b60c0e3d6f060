"""Two replicas under load while everything that can fail does: only what was in flight on a dead replica may fail, and it is counted."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.s3_server import S3Server
from plora_ray.store import AdapterStore
from tests.chaos.faulty_s3 import FaultyS3
from tests.chaos.serving import Load, client, serving
from tests.generations import publish

USERS = [f"user {place}" for place in range(40)]
THREADS = 4
PATIENCE_S = 60.0


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    with S3Server(tmp_path / "s3") as server:
        server.create_bucket("plora")
        with FaultyS3(server.endpoint_url) as proxy:
            yield proxy


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {PATIENCE_S:.0f} s"
        time.sleep(0.05)


def rounds(load: Load, count: int) -> None:
    """Wait until every user was asked that often from now on."""
    began = time.monotonic()
    wait_for(lambda: len(load.since(began)) >= count * len(USERS), "load")


def test_two_replicas_under_load_ride_out_a_failing_and_a_hanging_store_an_erasure_a_swap_and_a_killed_replica(
    tiny_tree: dict[str, Any], tmp_path: Path, s3: FaultyS3
) -> None:
    tree = {
        **tiny_tree,
        "store": {"uri": "s3://plora/adapters", "endpoint_url": s3.endpoint_url},
        "serving": {"replicas": 2, "replica_cpus": 0.5, "refresh_s": 0.2, "adapter_max_age_s": 600, "audit": {"enabled": False}},
    }
    config = tmp_path / "settings.yaml"
    config.write_text(yaml.safe_dump(tree))
    options = {"key": "k", "secret": "s", "endpoint_url": s3.server.geturl(), "client_kwargs": {"region_name": "us-east-1"}}
    store = AdapterStore("s3://plora/adapters", options)
    plm = tree["model"]["name"]
    publish(store, plm, "g1", USERS)
    with serving(config) as server, client(server) as operator, Load(server.url, USERS, THREADS) as load:
        rounds(load, 3)  # everybody is in memory

        for fault in ("503", "hang"):  # the store fails, then says nothing at all
            began = time.monotonic()
            outage = s3.fail(fault, "/plora", seconds=3600)  # type: ignore[arg-type]
            wait_for(lambda outage=outage: outage.began_s is not None, "outage")
            rounds(load, 3)
            s3.heal()
            assert {sent.personalization for sent in load.since(began)} == {"adapter"}

        operator.erase(USERS[0])  # a user leaves while requests for him go on
        began = time.monotonic()
        wait_for(lambda: [sent for sent in load.since(began) if sent.user == USERS[0]][-1:] != [], "request of the erased user")
        wait_for(
            lambda: len([sent for sent in load.since(began) if sent.user == USERS[0] and sent.personalization == "population"]) > 3, "x"
        )

        publish(store, plm, "g2", USERS, seed=5)  # a generation is swapped
        wait_for(lambda: {name for sent in load.sent[-80:] for name in sent.generations} == {"g2"}, "swap on both replicas")
        assert not load.failed, load.failed[:3]

        victim, *others = server.replicas()
        killed = time.monotonic()
        victim.send_signal(signal.SIGKILL)
        rounds(load, 3)
        wait_for(lambda: len({replica.pid for replica in server.replicas()} - {victim.pid}) == len(others) + 1, "second replica")
        rounds(load, 1)
    failed = load.failed
    print([(sent.began_s - killed, sent.ended_s - killed, sent.status) for sent in failed], len(load.sent))
    assert all(len(sent.generations) == 1 for sent in load.sent if sent.status == 200)
    assert {sent.personalization for sent in load.sent if sent.user == USERS[0] and sent.began_s > began + 5} <= {"population"}
    assert len(failed) <= THREADS and all(sent.began_s < killed < sent.ended_s for sent in failed), failed
