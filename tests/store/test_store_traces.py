"""What is left of a user is told from the bytes, whatever readers may still see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from plora_ray.store import AdapterStore, collection
from plora_ray.store.traces import traces_of

Make = Callable[..., Any]


def test_an_erased_users_bytes_are_told_until_the_generations_that_hold_them_are_gone(
    store: AdapterStore, make_users: Make, publish: Make, make_fresh: Make
) -> None:
    users = make_users(7)
    key, other = store.key("user-2"), store.key("user-3")
    publish("g1", users)
    writer = store.begin("g2")
    writer.write_row_digests(0, np.frombuffer(key, np.uint8).reshape(1, 16), np.zeros((1, 16), np.uint8))
    publish("g2", users)
    store.put_fresh(make_fresh("user-2"))
    held = traces_of(store, key)
    assert (held.records, held.row_digests, held.fresh_adapter, held.erased) == (["g1", "g2"], ["g2"], True, None)
    version = store.erase(key)
    left = traces_of(store, key)
    assert (left.records, left.row_digests, left.fresh_adapter, left.erased) == (["g1", "g2"], ["g2"], False, version)
    assert store.open_generation().get(key) is None, "though nobody is served it"
    publish("g3", {name: value for name, value in users.items() if name != key})
    collection.collect(store, keep=1, grace_s=0)
    gone = traces_of(store, key)
    assert (gone.records, gone.row_digests, gone.fresh_adapter, gone.erased, gone.unfinished) == ([], [], False, version, [])
    assert traces_of(store, other).records == ["g3"]


def test_a_stranger_leaves_no_trace_and_unfinished_work_is_named(store: AdapterStore, make_users: Make, publish: Make) -> None:
    publish("g1", make_users(5))
    store.begin("g2")
    store.objects.write("runs/0123/run.json", b"{}")
    found = traces_of(store, store.key("a stranger"))
    assert (found.records, found.row_digests, found.fresh_adapter, found.erased) == ([], [], False, None)
    assert found.unfinished == ["g2", "runs/0123"]
