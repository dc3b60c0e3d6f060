"""Fresh adapters, erasure and the key that hides user ids."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plora_ray.errors import CorruptObjectError, InvalidUserId, StoreError
from plora_ray.store import AdapterStore, new_version

Make = Callable[..., Any]
Place = tuple[str, dict[str, Any] | None]


def test_a_fresh_adapter_reads_back_bit_exact(store: AdapterStore, make_fresh: Make) -> None:
    adapter = make_fresh("ann")
    assert store.get_fresh(adapter.key) is None
    store.put_fresh(adapter)
    found = store.get_fresh(adapter.key)
    assert found is not None and found.record.tobytes() == adapter.record.tobytes()
    assert (found.version, found.examples, found.basis, found.source) == (adapter.version, 4, adapter.basis, "fresh")


def test_an_older_fresh_adapter_never_replaces_a_newer_one(store: AdapterStore, make_fresh: Make) -> None:
    older, newer = make_fresh("ann", value=1.0), make_fresh("ann", value=2.0)
    store.put_fresh(newer)
    store.put_fresh(older)
    assert store.get_fresh(newer.key).version == newer.version


def test_of_many_writers_of_one_user_the_newest_stays(store: AdapterStore, make_fresh: Make) -> None:
    adapters = [make_fresh("ann", value=float(number)) for number in range(6)]
    threads = [threading.Thread(target=store.put_fresh, args=(adapter,)) for adapter in reversed(adapters)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.get_fresh(adapters[0].key).version == adapters[-1].version


def test_a_damaged_fresh_object_is_refused_until_the_user_adapts_again(store: AdapterStore, make_fresh: Make) -> None:
    adapter = make_fresh("ann")
    store.put_fresh(adapter)
    path = next(item.path for item in store.objects.list("users"))
    data = bytearray(store.objects.read(path))
    data[-1] ^= 1
    store.objects.write(path, bytes(data))
    with pytest.raises(CorruptObjectError):
        store.get_fresh(adapter.key)
    store.put_fresh(make_fresh("ann"))
    assert store.get_fresh(adapter.key) is not None
    store.objects.write(path.replace(adapter.key.hex(), store.key("bob").hex()), store.objects.read(path))
    store.objects.write(f"users/{store.key('bob').hex()[:2]}/{store.key('bob').hex()}.safetensors", store.objects.read(path))
    with pytest.raises(CorruptObjectError, match="another user's"):
        store.get_fresh(store.key("bob"))


def test_an_erased_user_never_comes_back(store: AdapterStore, make_users: Make, publish: Make, make_fresh: Make) -> None:
    users = make_users(5)
    publish("g1", users)
    publish("g2", users)
    key, other = store.key("user-0"), store.key("user-1")
    reader = store.open_generation()
    running_fit = make_fresh("user-0", basis=reader.basis)
    store.put_fresh(make_fresh("user-0", basis=reader.basis, version="00000000000000000001-00000000"))
    version = store.erase(key)
    assert store.tombstones() == {key: version} and store.is_erased(key) and not store.is_erased(other)
    assert store.get_fresh(key) is None
    assert store.pull(reader, key) is None, "even before the reader refreshes"
    store.tombstones()
    assert reader.lookup(key) is None and reader.get(key) is None and key not in list(reader.keys())
    assert reader.get_many(users).keys() == users.keys() - {key}
    store.activate("g1")
    rolled_back = store.open_generation()
    assert rolled_back.get(key) is None and store.pull(rolled_back, key) is None
    with pytest.raises(StoreError, match="erased after this fit began"):
        store.put_fresh(running_fit)
    publish("g3", users)  # a job that still had the user's rows
    assert store.pull(store.open_generation("g3"), key) is None
    assert store.pull(rolled_back, other) is not None


def test_a_user_who_comes_back_by_new_examples_is_served_by_them_only(
    store: AdapterStore, make_users: Make, publish: Make, make_fresh: Make
) -> None:
    users = make_users(5)
    publish("g1", users)
    key = store.key("user-0")
    reader = store.open_generation()
    store.erase(key)
    returned = make_fresh("user-0", basis=reader.basis)
    store.put_fresh(returned)
    assert store.pull(reader, key).version == returned.version and not store.is_erased(key)
    publish("g2", users, shared_value=2.0)
    assert store.pull(store.open_generation("g2"), key) is None, "not by a segment's record"
    store.tombstones()
    assert reader.get(key) is None and store.pull(reader, key).version == returned.version
    assert store.erase(key) > returned.version and store.pull(reader, key) is None


def test_erasing_wins_over_an_adapter_from_a_machine_whose_clock_is_ahead(store: AdapterStore, make_fresh: Make) -> None:
    ahead = make_fresh("ann", version=new_version(after="90000000000000000000-00000000"))
    store.put_fresh(ahead)
    assert store.erase(ahead.key) > ahead.version
    assert store.get_fresh(ahead.key) is None and store.is_erased(ahead.key)


def test_object_names_and_contents_never_hold_the_raw_id(store: AdapterStore, make_fresh: Make, make_users: Make, publish: Make) -> None:
    user_id = "alice.liddell@example.org"
    publish("g1", make_users(3, prefix=user_id))
    store.put_fresh(make_fresh(user_id))
    store.erase(store.key(user_id + "-1"))
    for item in store.objects.list():
        assert "alice" not in item.path and b"alice" not in store.objects.read(item.path)


def test_a_store_hashes_ids_with_its_own_key_and_keeps_it(place: Place, tmp_path: Path) -> None:
    store = AdapterStore(*place)
    again = AdapterStore.open(*place)
    assert (again.store_id, again.key("ann")) == (store.store_id, store.key("ann")) and len(store.key("ann")) == 16
    assert AdapterStore(str(tmp_path / "other")).key("ann") != store.key("ann")
    assert copy.deepcopy(store).key("ann") == store.key("ann")
    with pytest.raises(InvalidUserId):
        store.key("")


def test_a_key_from_outside_is_never_written_and_a_wrong_one_is_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = b"sixteen bytes or more"
    store = AdapterStore(*place, secret=secret)
    written = store.objects.read("store.json")
    assert secret not in written and secret.hex().encode() not in written and b'"key_hex": null' in written
    assert AdapterStore.open(*place, secret=secret).key("ann") == store.key("ann")
    with pytest.raises(StoreError, match="set PLORA_STORE_KEY"):
        AdapterStore.open(*place)
    with pytest.raises(StoreError, match="made with another key"):
        AdapterStore.open(*place, secret=secret + b"!")
    monkeypatch.setenv("PLORA_STORE_KEY", "short")
    with pytest.raises(StoreError, match="too short"):
        AdapterStore.open(*place)


def test_the_environment_gives_the_key_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    AdapterStore(str(tmp_path / "own"))
    monkeypatch.setenv("PLORA_STORE_KEY", "correct horse battery staple")
    key = AdapterStore(str(tmp_path / "outside")).key("ann")
    assert AdapterStore.open(str(tmp_path / "outside")).key("ann") == key
    assert b"horse" not in (tmp_path / "outside" / "store.json").read_bytes()
    with pytest.raises(StoreError, match="unset PLORA_STORE_KEY"):
        AdapterStore.open(str(tmp_path / "own"))


def test_two_makers_of_one_store_agree_on_its_key(place: Place) -> None:
    keys: list[bytes] = []
    threads = [threading.Thread(target=lambda: keys.append(AdapterStore(*place).key("ann"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(keys) == 4 and len(set(keys)) == 1


def test_a_missing_store_is_not_made_by_opening_it(place: Place, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no adapter store at"):
        AdapterStore.open(*place)
    with pytest.raises(StoreError, match="run train-all first"):
        AdapterStore.open(*place, create=True).open_generation()


def test_an_unwritable_store_is_one_line_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError) as caught:
        AdapterStore(str(tmp_path / "file"))
    assert "\n" not in str(caught.value) and "not a folder" in str(caught.value).replace("Not a directory", "not a folder")
