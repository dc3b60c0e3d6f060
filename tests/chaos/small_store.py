"""A store of eight users and what is done to it, for tests that disturb it in the middle."""

from __future__ import annotations

import uuid
from typing import Any

import numpy as np

from plora_ray.adapters.labels import LabelSpace
from plora_ray.store import AdapterStore, ModelRef, RootKeySource, UserAdapter, new_version

SECRET = b"of every small store that is encrypted"
ROOT_KEY_VARIABLE = "CHAOS_ROOT_KEY"
USERS = [f"user-{number}" for number in (96, 132, 333, 398, 74, 252, 376, 645)]  # of two key shards, which keeps the steps few
WIDTH = 3
State = dict[str, bytes]


def publish(store: AdapterStore, generation: str, value: float, width: int = WIDTH) -> None:
    """Two waves of four users, whose numbers are `value` plus their place."""
    writer = store.begin(generation)
    writer.write_shared({"B": np.ones(2, np.float32)}, {})
    order = sorted(range(len(USERS)), key=lambda place: store.key(USERS[place]))
    for wave, part in enumerate((order[:4], order[4:])):
        keys = np.frombuffer(b"".join(store.key(USERS[place]) for place in part), np.uint8).reshape(-1, 16)
        records = np.repeat(np.array(part, np.float32)[:, None] + np.float32(value), width, 1)
        writer.write_row_digests(wave, keys, np.full((len(part), 16), 9, np.uint8))
        writer.write_segment(wave, keys, records, np.full(len(part), 7, np.int32))
    config = {"labels": LabelSpace("classification", ("no", "yes")).to_json()}
    writer.commit(expected_users=len(USERS), model=ModelRef(name="m", weight_hash="0"), adapter_config=config)


def adapt(store: AdapterStore, user: str, value: float, width: int = WIDTH) -> None:
    record, basis = np.full(width, value, np.float32), store.open_generation().basis
    store.put_fresh(UserAdapter(store.key(user), record, 4, "g1", new_version(), "now", "fresh", basis))


def served(store: AdapterStore) -> State:
    """By user, the bytes of the adapter that a fresh reader is given."""
    reader = store.open_generation()
    found = {user: store.pull(reader, store.key(user)) for user in USERS}
    return {user: adapter.record.tobytes() for user, adapter in found.items() if adapter is not None}


def nobody_watches(done: int, users: int) -> None:
    pass


def opened(uri: str, options: dict[str, Any] | None = None) -> AdapterStore:
    """The store as another process opens it; one whose name says so is encrypted."""
    if not uri.endswith("/encrypted"):
        return AdapterStore(uri, options)
    return AdapterStore(uri, options, SECRET, encryption=RootKeySource(key_env=ROOT_KEY_VARIABLE))


def prepared(uri: str | None = None, options: dict[str, Any] | None = None, width: int = WIDTH, kind: str = "plain") -> AdapterStore:
    """Two generations of the same shared weights, two users adapted since and one erased; in memory if not elsewhere."""
    store = opened(uri or f"memory://{uuid.uuid4().hex}/{kind}", options)
    publish(store, "g1", 100.0, width)
    publish(store, "g2", 200.0, width)
    adapt(store, USERS[1], 401.0, width)
    adapt(store, USERS[2], 402.0, width)
    store.erase(store.key(USERS[3]))
    return store
