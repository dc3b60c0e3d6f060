"""A generation copied into another store: the same users, the same bytes, nobody who was erased, and never half of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plora_ray.errors import CorruptObjectError, StoreError
from plora_ray.store import AdapterStore, ModelRef, ObjectStore, RootKeySource, names
from plora_ray.store.fsck import check
from plora_ray.store.transfer import copy_generation, open_target

Make = Callable[..., Any]


@pytest.fixture
def copy_target(store: AdapterStore, tmp_path: Path, root_key: RootKeySource) -> Callable[[str], AdapterStore]:
    """An empty store in a folder, encrypted if `store` is."""
    return lambda name: open_target(store, str(tmp_path / name), None, root_key if store.encrypted else None)


def unwatched(done: int, total: int) -> None:
    assert done <= total


def test_a_copy_serves_every_user_the_same_bytes_and_honours_erasures_before_and_after(
    store: AdapterStore, make_users: Make, publish: Make, make_fresh: Make, copy_target: Make
) -> None:
    users = make_users(9)
    publish("g1", users)
    basis = store.open_generation().basis
    store.put_fresh(make_fresh("user-1", basis=basis))
    store.put_fresh(make_fresh("user-2"))  # of other shared weights
    store.erase(store.key("user-3"))
    target = copy_target("copy")
    copy_generation(store, "g1", target, unwatched)
    assert target.current() is None and target.store_id != store.store_id
    target.activate("g1")
    reader, copied = store.open_generation("g1"), target.open_generation()
    for key in users:
        here, there = store.pull(reader, key), target.pull(copied, key)
        assert (here is None) == (there is None) == (key == store.key("user-3"))
        assert here is None or there is None or (here.record.tobytes(), here.version) == (there.record.tobytes(), there.version)
    assert target.get_fresh(store.key("user-2")) is None and check(target, unwatched).problems == []
    store.erase(store.key("user-4"))
    copy_generation(store, "g1", target, unwatched)
    assert target.pull(target.open_generation(), store.key("user-4")) is None


def test_a_copy_that_was_stopped_goes_on_and_is_no_generation_before_its_end(
    store: AdapterStore, make_users: Make, publish: Make, copy_target: Make
) -> None:
    publish("g1", make_users(9))
    target = copy_target("copy")

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copy_generation(store, "g1", target, stop)
    assert target.generations() == []
    half = next(item.path for item in target.objects.list("generations/g1/segments"))
    target.objects.write(half, target.objects.read(half)[:50])
    copy_generation(store, "g1", target, unwatched)
    assert target.open_generation("g1").users == 9 and check(target, unwatched).problems == []


def test_damage_is_not_copied_and_another_generation_of_the_name_or_other_keys_are_refused(
    store: AdapterStore, tmp_path: Path, make_users: Make, publish: Make, copy_target: Make, root_key: RootKeySource
) -> None:
    publish("g1", make_users(5))
    target = copy_target("copy")
    path = names.segment("g1", 1)
    data = store.objects.read(path)
    store.objects.write(path, data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CorruptObjectError, match="isn't what was published"):
        copy_generation(store, "g1", target, unwatched)
    assert target.generations() == []
    store.objects.write(path, data)
    copy_generation(store, "g1", target, unwatched)
    encryption = root_key if store.encrypted else None
    foreign = AdapterStore(str(tmp_path / "foreign"), encryption=encryption)
    with pytest.raises(StoreError, match="by another key"):
        open_target(store, foreign.uri, None, encryption)
    twin = copy_target("twin")
    writer = twin.begin("g1")
    writer.write_shared({"B": np.zeros(1, np.float32)}, {})
    writer.commit(expected_users=0, model=ModelRef(name="m", weight_hash="0"), adapter_config={})
    with pytest.raises(StoreError, match="has another generation g1"):
        copy_generation(store, "g1", twin, unwatched)
    assert twin.open_generation("g1").users == 0
    with pytest.raises(StoreError, match="no generation g9"):
        copy_generation(store, "g9", target, unwatched)


def test_a_copy_keeps_the_key_of_the_user_hash_where_the_source_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLORA_STORE_KEY", "a key that stays outside of every store")
    source = AdapterStore(str(tmp_path / "source"))
    open_target(source, str(tmp_path / "copy"))
    assert AdapterStore(str(tmp_path / "copy")).key("ann") == source.key("ann")
    monkeypatch.delenv("PLORA_STORE_KEY")
    with pytest.raises(StoreError, match="set PLORA_STORE_KEY"):
        AdapterStore(str(tmp_path / "copy"))
    assert b"outside" not in ObjectStore(str(tmp_path / "copy")).read(names.IDENTITY)
