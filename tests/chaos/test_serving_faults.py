"""Replicas under load while everything fails that can, a node too: only what was in flight there may fail, and it is counted."""

from __future__ import annotations

import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, takewhile
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.local import LocalCluster
from cluster.node_process import free_port
from cluster.serve_application import ServeApplication
from cluster.serve_environment import haproxy_environment, shared_port_environment
from plora_ray.client import Client
from plora_ray.store import AdapterStore
from tests.chaos.faulty_s3 import Fault, FaultyS3
from tests.chaos.serving import Load, Sent, serving
from tests.generations import publish

USERS = [f"user {place}" for place in range(40)]
NODE_ENDS_S = 2.0
THREADS = 4
FAULTS: tuple[Fault, ...] = ("503", "hang")
PATIENCE_S = 60.0


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {PATIENCE_S:.0f} s"
        time.sleep(0.05)


def rounds(load: Load, count: int) -> None:
    """Wait until every user was asked that often from now on."""
    began = time.monotonic()
    wait_for(lambda: len(load.since(began)) >= count * len(USERS), "load")


def publish_for(tree: dict[str, Any], s3: FaultyS3, folder: Path) -> tuple[Path, AdapterStore]:
    """The settings file of two replicas over the faulty store, and the store itself without its faults."""
    tree["store"] = {"uri": "s3://plora/adapters", "endpoint_url": s3.endpoint_url}
    tree["serving"] = {"replicas": 2, "replica_cpus": 0.5, "refresh_s": 0.2, "adapter_max_age_s": 600, "audit": {"enabled": False}}
    config = folder / "settings.yaml"
    config.write_text(yaml.safe_dump(tree))
    options = {"key": "k", "secret": "s", "endpoint_url": s3.server.geturl(), "client_kwargs": {"region_name": "us-east-1"}}
    store = AdapterStore("s3://plora/adapters", options)
    publish(store, tree["model"]["name"], "g1", USERS)
    return config, store


def assert_only_what_was_in_flight_failed(failed: Sequence[Sent]) -> None:
    """There is one moment at which all failed requests were under way: that of the replica's end."""
    assert len(failed) <= THREADS
    assert not failed or max(sent.began_s for sent in failed) < min(sent.ended_s for sent in failed), failed


def test_two_replicas_under_load_ride_out_a_failing_and_a_hanging_store_an_erasure_a_swap_a_killed_replica_and_their_end(
    tiny_tree: dict[str, Any], tmp_path: Path, s3: FaultyS3
) -> None:
    config, store = publish_for(tiny_tree, s3, tmp_path)
    with serving(config) as server, Client(server.url) as operator, Load(server.url, USERS, THREADS) as load:
        rounds(load, 3)  # everybody is in memory

        for fault in FAULTS:  # the store fails, then says nothing at all
            began = time.monotonic()
            outage = s3.fail(fault, "/plora", seconds=3600)
            wait_for(lambda outage=outage: outage.began_s is not None, "outage")  # type: ignore[misc]
            rounds(load, 3)
            s3.heal()
            assert {sent.personalization for sent in load.since(began)} == {"adapter"}

        operator.erase(USERS[0])  # a user leaves while requests for him go on
        erased = time.monotonic()
        wait_for(lambda: [sent.personalization for sent in load.sent if sent.user == USERS[0]][-3:] == ["population"] * 3, "erasure")

        publish(store, tiny_tree["model"]["name"], "g2", USERS, seed=5)
        wait_for(lambda: {name for sent in load.sent[-80:] for name in sent.generations} == {"g2"}, "swap on both replicas")
        assert not load.failed, load.failed[:3]

        server.replicas()[0].send_signal(signal.SIGKILL)
        rounds(load, 3)
        killed = load.failed
        ended = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(60)
    assert_only_what_was_in_flight_failed(killed)
    cut_off = [sent for sent in load.failed if sent.began_s < ended and sent not in killed]
    assert not cut_off, cut_off
    assert all(len(sent.generations) == 1 for sent in load.sent if sent.status == 200)
    left = [sent.personalization for sent in load.sent if sent.user == USERS[0] and sent.began_s > erased and sent.status == 200]
    assert "adapter" not in left[left.index("population") :], "an erased user came back"


@pytest.mark.chaos
def test_a_node_lost_under_load_takes_only_what_was_in_flight_on_it_and_nothing_from_the_client_that_tries_again(
    tiny_tree: dict[str, Any], tmp_path: Path
) -> None:
    publish(AdapterStore(tiny_tree["store"]["uri"]), tiny_tree["model"]["name"], "g1", USERS)
    tree = {**tiny_tree, "serving": {"replicas": 2, "replica_cpus": 0.5, "audit": {"enabled": False}}}
    port, nodes_folder = free_port(), Path(tempfile.mkdtemp(prefix="p", dir="/tmp"))  # a short path: sockets lie below it
    environment = {**haproxy_environment(), **shared_port_environment(port)}
    url, ended = f"http://127.0.0.1:{port}", threading.Event()

    def ask_patiently() -> list[str]:
        users = takewhile(lambda _: not ended.is_set(), cycle(USERS))
        with Client(url) as client:
            return [client.predict([(user, "a text")])[0]["personalization"] for user in users]

    with LocalCluster(3, 2, temp_dir=nodes_folder, env=environment, head_cpus=0) as nodes:
        application = ServeApplication(nodes, tmp_path, free_port())
        application.deploy(tree)
        application.wait_for(2)
        assert all(len(application.on_node(worker)) == 1 for worker in (1, 2)), "a replica on each worker"
        application.wait_until_answering(url)
        with ThreadPoolExecutor() as patient, Load(url, USERS, THREADS) as load:
            asked = patient.submit(ask_patiently)
            try:
                rounds(load, 3)
                assert not load.failed, load.failed[:3]
                lost_s = time.monotonic()
                nodes.remove_node(2)
                rounds(load, 5)
            finally:
                ended.set()
        assert set(asked.result()) == {"adapter"}
    shutil.rmtree(nodes_folder)
    # A node's processes end one after another: what was under way through its HAProxy breaks, what the other had there may be a 500.
    assert len(load.failed) <= THREADS, load.failed
    assert all(sent.began_s < lost_s + NODE_ENDS_S and sent.status in (0, 500) for sent in load.failed), load.failed


@pytest.mark.chaos
def test_each_of_three_replicas_killed_one_after_the_other_is_replaced_and_takes_only_its_own_requests_with_it(
    tiny_tree: dict[str, Any], tmp_path: Path, s3: FaultyS3
) -> None:
    config, _ = publish_for(tiny_tree, s3, tmp_path)
    with serving(config) as server, Load(server.url, USERS, THREADS) as load:
        rounds(load, 3)
        for _ in range(3):
            known, before = server.replicas(), len(load.failed)
            known[0].send_signal(signal.SIGKILL)
            wait_for(lambda known=known: set(server.replicas()) - set(known) != set(), "new replica")  # type: ignore[misc]
            rounds(load, 20)
            assert_only_what_was_in_flight_failed(load.failed[before:])
