"""A second S3 server, written by others: a store lives its whole life on it as it does on the first."""

from __future__ import annotations

import urllib.request
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from moto.server import ThreadedMotoServer

from plora_ray.store import AdapterStore, UserAdapter, s3_multipart
from plora_ray.store.collection import collect
from plora_ray.store.fsck import check
from plora_ray.store.object_errors import ObjectExists
from plora_ray.store.transfer import copy_generation, open_target


@pytest.fixture(scope="module")
def second_server() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    direct.open(urllib.request.Request(f"{url}/second", method="PUT"), timeout=10).close()
    yield url
    server.stop()


@pytest.fixture
def place(second_server: str) -> tuple[str, dict[str, Any] | None]:
    options = {"key": "k", "secret": "s", "endpoint_url": second_server, "client_kwargs": {"region_name": "us-east-1"}}
    return f"s3://second/{uuid.uuid4().hex}", options


def nobody_watches(done: int, total: int) -> None:
    pass


def test_a_store_s_whole_life_ends_as_on_any_other_storage(
    store: AdapterStore,
    place: tuple[str, dict[str, Any] | None],
    make_users: Callable[..., Any],
    publish: Callable[..., None],
    make_fresh: Callable[..., UserAdapter],
) -> None:
    first, second = make_users(12, seed=1), make_users(12, seed=2)
    publish("g1", first)
    publish("g2", second)
    leaving, adapted, staying = store.key("user-1"), store.key("user-2"), store.key("user-3")
    store.put_fresh(make_fresh("user-2", store.open_generation().basis, 7.0))
    store.put_fresh(make_fresh("user-2", store.open_generation().basis, 8.0))
    store.put_fresh(make_fresh("user-1", store.open_generation().basis, 9.0))
    store.erase(leaving)
    expected = {key: record for key, (record, _) in second.items() if key != leaving} | {adapted: np.full(6, 8.0, np.float32)}

    def served(anyone: AdapterStore) -> dict[bytes, bytes]:
        reader = anyone.open_generation()
        return {key: found.record.tobytes() for key in second if (found := anyone.pull(reader, key)) is not None}

    assert served(AdapterStore.open(*place)) == {key: record.tobytes() for key, record in expected.items()}
    store.activate("g1")
    assert store.pull(store.open_generation(), staying).record.tobytes() == first[staying][0].tobytes()
    assert store.pull(store.open_generation(), leaving) is None
    store.activate("g2")
    assert [item.generation for item in collect(store, keep=1, grace_s=0)] == ["g1"]
    target = open_target(store, place[0] + "-copy", place[1])
    copy_generation(store, "g2", target, nobody_watches)
    target.activate("g2")
    for anyone in (store, target):
        assert served(AdapterStore.open(anyone.uri, place[1])) == {key: record.tobytes() for key, record in expected.items()}
        found = check(anyone, nobody_watches)
        assert found.problems == [] and found.unknown == [] and (found.generations, found.erased) == (1, 1)


def test_an_object_in_parts_is_created_whole_and_only_once(store: AdapterStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_multipart, "MIN_BYTES", 12 * 2**20)
    monkeypatch.setattr(s3_multipart, "PART_BYTES", 5 * 2**20)
    first, second = (np.random.default_rng(seed).bytes(12 * 2**20 + 1) for seed in (1, 2))
    store.objects.create("large", first)
    with pytest.raises(ObjectExists):
        store.objects.create("large", second)
    assert store.objects.read("large") == first and store.objects.abort_uploads(0) == 0
