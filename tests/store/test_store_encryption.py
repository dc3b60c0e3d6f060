"""What is one user's is readable with that user's data key only, in its own place only, and by nobody once the key is destroyed."""

from __future__ import annotations

import pickle
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plora_ray.errors import CorruptObjectError, ErasedDuringFit, StoreError
from plora_ray.store import AdapterStore, ModelRef, RootKeySource, names, new_version
from plora_ray.store.adapters import decode_fresh
from plora_ray.store.encryption.ring import KeyRing, rotate_root
from plora_ray.store.encryption.sealing import Place
from plora_ray.store.encryption.shards import KeyRow, KeyShard
from plora_ray.store.encryption.user_keys import UserKeys
from plora_ray.store.folding import raise_late_versions
from plora_ray.store.fsck import Checked, check
from plora_ray.store.manifest import load_json
from plora_ray.store.segments import decode_segment, encode_segment
from plora_ray.store.traces import traces_of
from plora_ray.store.transfer import copy_generation, open_target

Make = Callable[..., Any]
ROOT, OTHER = "5a" * 32, "c3" * 32


@pytest.fixture
def place() -> tuple[str, None]:
    """An encrypted store in memory."""
    return f"memory://{uuid.uuid4().hex}/encrypted", None


def nobody_watches(done: int, total: int) -> None:
    pass


def checked(store: AdapterStore) -> Checked:
    return check(store, nobody_watches)


def every_data_key(store: AdapterStore) -> list[bytes]:
    """All data keys that the root key opens, unwrapped without the store's own code."""
    ring = load_json(KeyRing, store.objects.read(names.KEY_RING), "ring")
    keys = []

    def opened(key: bytes, sealed: bytes, *parts: bytes) -> bytes:
        associated = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
        return AESGCM(key).decrypt(sealed[:12], sealed[12:], associated)

    wrapping = {
        item.version: opened(
            bytes.fromhex(ROOT), bytes.fromhex(item.wrapped_hex),
            b"plora-ring-version", str(item.version).encode(), b"plora-store", store.store_id.encode(),
        )
        for item in ring.keys
    }  # fmt: skip
    for item in store.objects.list(names.KEYS):
        if names.key_shard_byte(item.path) is not None:
            data = store.objects.read(item.path)
            rows = data[8 + int.from_bytes(data[:8], "little") :]
            for row in (rows[start : start + 96] for start in range(0, len(rows), 96)):
                version = int.from_bytes(row[32:36], "big")
                keys.append(opened(wrapping[version], row[36:], b"plora-data-key", store.store_id.encode(), row[:36]))
    return keys


def records_in(store: AdapterStore, generation: str) -> dict[bytes, np.ndarray]:
    """By user, the records of a generation as they are stored."""
    found: dict[bytes, np.ndarray] = {}
    for item in store.objects.list(names.segments(generation)):
        segment = decode_segment(store.objects.read(item.path), item.path)
        found |= {key.tobytes(): record for key, record in zip(segment.keys, segment.records, strict=True)}
    return found


def opens(keys: list[bytes], store: AdapterStore, user: bytes, generation: str) -> bool:
    """Whether any of the keys opens the user's record of the generation, whatever the store's code thinks of it."""
    sealed, basis = records_in(store, generation)[user].tobytes(), store.manifest(generation).shared.sha256
    parts = (b"plora-record", store.store_id.encode(), user, generation.encode(), basis.encode(), b"plora")
    associated = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    for key in keys:
        try:
            AESGCM(key).decrypt(sealed[:12], sealed[12:], associated)
        except Exception:
            continue
        return True
    return False


def test_no_object_of_an_encrypted_store_holds_a_record_and_each_data_key_is_one_users(
    store: AdapterStore, make_users: Make, publish: Make, make_fresh: Make
) -> None:
    users = make_users(20)
    publish("g1", users)
    adapter = make_fresh("user-1", value=0.123)
    store.put_fresh(adapter)
    secrets = [record.tobytes()[:8] for record, _ in users.values()] + [adapter.record.tobytes()[:8]]
    written = [store.objects.read(item.path) for item in store.objects.list()]
    assert not any(secret in data for secret in secrets for data in written)
    keys = every_data_key(store)
    assert len(keys) == len(set(keys)) == 20 and not any(key in data for key in keys for data in written)
    assert all(opens([key], store, user, "g1") for key, user in zip(keys, sorted(users), strict=True))
    reader = store.open_generation()
    assert all(reader.get(key).record.tobytes() == record.tobytes() for key, (record, _) in users.items())
    plain = AdapterStore(f"memory://{uuid.uuid4().hex}")
    plain.put_fresh(replace(adapter, key=plain.key("user-1")))
    assert any(secrets[-1] in plain.objects.read(item.path) for item in plain.objects.list()), "as it would be found"
    assert b'"format_version": "1"' in plain.objects.read("store.json") and b"encryption" not in plain.objects.read("store.json")


def test_a_record_moved_to_another_user_generation_model_or_store_does_not_decrypt(
    store: AdapterStore, make_users: Make, publish: Make
) -> None:
    users = sorted(make_users(4))
    publish("g1", make_users(4))
    manifest = store.manifest("g1")
    assert manifest is not None
    home, stored = Place("g1", manifest.shared.sha256, "plora"), records_in(store, "g1")
    assert store.records.open(users[0], stored[users[0]], home, "here").dtype == np.float32
    data_key = store.keys.get(users[0])
    moved = [(users[0], replace(home, **{field: "x"})) for field in ("generation", "basis", "kind")] + [(users[1], home)]
    for user, place in moved:
        with pytest.raises(CorruptObjectError, match="can't be decrypted|wasn't sealed"):
            store.records.open(user, stored[users[0]], place, "here")
        with pytest.raises(CorruptObjectError):
            store.records._opened(user, stored[users[0]], place, "here", data_key)  # not even with the right key
    store.keys.store_id = "0" * 32
    with pytest.raises(CorruptObjectError):
        store.records._opened(users[0], stored[users[0]], home, "here", data_key)


def test_a_whole_segment_passed_off_as_another_generations_is_never_served(store: AdapterStore, make_users: Make, publish: Make) -> None:
    users = make_users(4)
    publish("g1", users)
    writer = store.begin("g2")
    writer.copy_shared(store.objects.read(names.shared("g1")))
    for wave in range(3):
        old = decode_segment(store.objects.read(names.segment("g1", wave)), "old")
        forged = encode_segment(old.keys, old.records, old.examples, kind="plora", generation="g2", wave=wave)
        store.objects.create(names.segment("g2", wave), forged)
    writer.commit(expected_users=4, model=ModelRef(name="mini", weight_hash="00"), adapter_config={})
    reader = store.open_generation("g2")
    for key in users:
        with pytest.raises(CorruptObjectError, match="wasn't sealed for this"):
            store.pull(reader, key)
    with pytest.raises(CorruptObjectError, match="can't be decrypted"):
        reader.get_many(users)
    assert len(checked(store).problems) == 3


def test_keys_carried_into_another_store_open_nothing_there(store: AdapterStore, make_users: Make, publish: Make, root_key: Any) -> None:
    publish("g1", make_users(3))
    other = open_target(store, f"memory://{uuid.uuid4().hex}", None, root_key)
    for item in store.objects.list():
        if item.path != names.IDENTITY:
            other.objects.write(item.path, store.objects.read(item.path))
    with pytest.raises(StoreError, match="under another root key"):
        AdapterStore(other.uri, encryption=root_key)


def test_a_rotated_store_reads_all_and_the_old_root_key_opens_nothing(
    store: AdapterStore, make_users: Make, publish: Make, make_fresh: Make, monkeypatch: pytest.MonkeyPatch, root_key: Any
) -> None:
    users = make_users(12)
    publish("g1", users)
    before = {item.path: store.objects.read(item.path) for item in store.objects.list()}
    running = store.open_generation()
    monkeypatch.setenv("NEXT_ROOT_KEY", OTHER)
    following = RootKeySource(key_env="NEXT_ROOT_KEY")
    rotate_root(store.objects, store.store_id, root_key, following)
    changed = {path for path, data in before.items() if store.objects.read(path) != data}
    assert changed == {names.KEY_RING}, "no adapter and no data key is rewritten"
    assert all(running.get(key) is not None for key in users), "who has the store open goes on"
    with pytest.raises(StoreError, match="under another root key"):
        AdapterStore(store.uri, encryption=root_key)
    with pytest.raises(StoreError, match="under another root key"):
        rotate_root(store.objects, store.store_id, root_key, following)
    later = AdapterStore(store.uri, encryption=following)
    assert {key: item.record.tobytes() for key, item in later.open_generation().get_many(users).items()} == {
        key: record.tobytes() for key, (record, _) in users.items()
    }
    newcomer = replace(make_fresh("new"), key=later.key("new"))
    later.put_fresh(newcomer)
    with pytest.raises(StoreError, match="under another root key"):
        store.get_fresh(newcomer.key)
    monkeypatch.setenv("TEST_ROOT_KEY", OTHER)  # a mounted secret that was renewed in its place
    assert store.get_fresh(newcomer.key) is not None, "then even who had it open reads newcomers"
    assert versions(later) == {1, 2}
    UserKeys(later.objects, later.store_id, following).rewrap(nobody_watches)
    assert versions(later) == {2} and len(later.open_generation().get_many(users)) == 12 and checked(later).problems == []


def versions(store: AdapterStore) -> set[int]:
    """Versions of the ring by which data keys are wrapped."""
    paths = [item.path for item in store.objects.list(names.KEYS) if item.path != names.KEY_RING]
    return {KeyRow.parse(bytes(row)).ring_version for path in paths for row in KeyShard.decode(store.objects.read(path), path).rows}


def test_an_erased_users_bytes_stay_unreadable_even_with_the_tombstone_deleted_and_the_root_key_at_hand(
    store: AdapterStore, make_users: Make, publish: Make, make_fresh: Make, root_key: Any
) -> None:
    users = make_users(6)
    publish("g1", users)
    key, basis = store.key("user-2"), store.open_generation().basis
    store.put_fresh(make_fresh("user-2", basis=basis))
    kept = {item.path: store.objects.read(item.path) for item in store.objects.list() if not item.path.startswith("keys/")}
    assert opens(every_data_key(store), store, key, "g1") and traces_of(store, key).data_key is True
    store.erase(key)
    left = traces_of(store, key)
    assert left.records == ["g1"] and left.data_key is False and checked(store).problems == []
    for item in store.objects.list():
        if not item.path.startswith("keys/"):
            store.objects.delete(item.path)
    for path, data in kept.items():  # a backup of everything but the keys
        store.objects.write(path, data)
    restored = AdapterStore(store.uri, encryption=root_key)
    reader = restored.open_generation()
    assert restored.tombstones() == {} and reader.lookup(key) is not None
    with pytest.raises(CorruptObjectError, match="data key is gone"):
        restored.pull(reader, key)
    with pytest.raises(CorruptObjectError, match="data key is gone"):
        restored.get_fresh(key)
    restored.put_fresh(make_fresh("user-2", basis=basis, value=3.0))
    assert restored.pull(reader, key).record[0] == 3.0
    assert len(every_data_key(restored)) == 6 and not opens(every_data_key(restored), restored, key, "g1")


def test_a_user_who_comes_back_gets_a_new_key_even_if_the_erasure_was_cut_short(
    store: AdapterStore, make_users: Make, publish: Make, make_fresh: Make
) -> None:
    publish("g1", make_users(4))
    key, basis = store.key("user-1"), store.open_generation().basis
    before = store.keys.get(key)

    class Stopped(BaseException):
        pass

    def stop(*_: object) -> None:
        raise Stopped

    store.keys.destroy = stop  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        store.erase(key)
    del store.keys.destroy
    assert store.keys.get(key) == before and not store.keys.has(key) and store.pull(store.open_generation(), key) is None
    store.put_fresh(make_fresh("user-1", basis=basis))
    mine = store.keys.get(key)
    assert mine != before and not opens(every_data_key(store), store, key, "g1")
    store.keys.destroy(key, store.tombstones()[key])  # the first eraser, late
    assert store.keys.get(key) == mine and store.pull(store.open_generation(), key) is not None
    with pytest.raises(ErasedDuringFit):
        store.put_fresh(make_fresh("user-1", version="00000000000000000001-00000000"))


def test_a_running_job_never_makes_a_key_for_the_record_of_an_erased_user(
    store: AdapterStore, make_users: Make, as_arrays: Make, make_fresh: Make, root_key: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, records, examples = as_arrays(make_users(3))
    early, late, returned = (key.tobytes() for key in keys)
    writer, other = store.begin("g1"), AdapterStore(store.uri, encryption=root_key)
    writer.write_shared({"B": np.ones(2, np.float32)}, {})
    other.erase(early)
    other.erase(returned)
    other.put_fresh(replace(make_fresh("user-0"), key=returned))
    read_tagged, erased = store.objects._backend.read_tagged, []

    def erased_meanwhile(path: str) -> tuple[bytes, str]:
        if path == names.key_shard(late[0]) and not erased:
            erased.append(other.erase(late))  # between the job's look at the shard and its write
        return read_tagged(path)

    monkeypatch.setattr(store.objects._backend, "read_tagged", erased_meanwhile)
    writer.write_segment(0, keys, records, examples)
    assert erased and store.keys.get(early) is None and store.keys.get(late) is None and store.keys.has(returned)
    writer.commit(expected_users=3, model=ModelRef(name="m", weight_hash="0"), adapter_config={})
    assert not any(opens(every_data_key(store), store, user, "g1") for user in (early, late, returned))
    assert store.open_generation().get_many([early, late, returned]) == {} and checked(store).problems == []


def test_a_fresh_adapter_that_came_late_is_raised_without_being_opened(store: AdapterStore, make_fresh: Make) -> None:
    adapter = make_fresh("ann", version="00000000000000000001-00000000")
    store.put_fresh(adapter)
    version = new_version()
    assert raise_late_versions(store.objects, np.empty(0, np.uint64), adapter.basis, version) == 1
    found = store.get_fresh(adapter.key)
    assert found.version > version and found.record.tobytes() == adapter.record.tobytes()
    assert decode_fresh(store.objects.read(names.fresh(adapter.key)), "fresh").adapter.record.dtype == np.uint8


def test_a_key_read_before_its_user_came_back_is_read_again(store: AdapterStore, make_fresh: Make) -> None:
    adapter = make_fresh("ann")
    store.put_fresh(adapter)
    stale = store.objects.read(names.key_shard(adapter.key[0]))
    store.erase(adapter.key)
    returned = make_fresh("ann", value=2.0)
    store.put_fresh(returned)
    standing = store.fresh.read(adapter.key)
    assert store.fresh.opened(standing.adapter, stale).record[0] == 2.0


def test_a_wrong_missing_or_malformed_root_key_is_one_clear_line(
    store: AdapterStore, make_users: Make, publish: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root_key: Any
) -> None:
    publish("g1", make_users(3))
    wrong, missing = RootKeySource(key_file=tmp_path / "root.key"), RootKeySource(key_env="NOT_SET")
    for written, message in ((OTHER + "\n", "is encrypted under another root key: set store.encryption"), ("short", "write 64 hex digits")):
        (tmp_path / "root.key").write_text(written)
        with pytest.raises(StoreError, match=message) as caught:
            AdapterStore(store.uri, encryption=wrong)
        assert "\n" not in str(caught.value) and written.strip() not in str(caught.value)
    (tmp_path / "root.key").unlink()
    for source, message in ((wrong, "can't read the key file"), (missing, "NOT_SET is empty or not set"), (None, "is encrypted: set")):
        with pytest.raises(StoreError, match=message):
            AdapterStore(store.uri, encryption=source)
    with pytest.raises(StoreError, match="was made without encryption"):
        AdapterStore(AdapterStore(f"memory://{uuid.uuid4().hex}").uri, encryption=root_key)
    store.objects.delete(names.KEY_RING)
    for create in (True, False):
        with pytest.raises(StoreError, match=r"ring.json is gone.*: restore it"):
            AdapterStore(store.uri, encryption=root_key, create=create)


def test_a_copy_in_another_process_carries_no_key_and_reads_the_root_key_there(
    store: AdapterStore, make_users: Make, publish: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = make_users(3)
    publish("g1", users)
    ring = store.keys._opened(None)
    travelling = pickle.dumps(store)
    secrets = [bytes.fromhex(ROOT), ROOT.encode(), ring.key(1), *every_data_key(store)]
    assert not any(secret in travelling for secret in secrets)
    there: AdapterStore = pickle.loads(travelling)  # noqa: S301
    assert len(there.open_generation().get_many(users)) == 3
    monkeypatch.delenv("TEST_ROOT_KEY")
    with pytest.raises(StoreError, match="TEST_ROOT_KEY is empty or not set"):
        pickle.loads(travelling).open_generation().get_many(users)  # noqa: S301


def test_plain_generations_move_into_an_encrypted_store_and_never_back(
    store: AdapterStore, make_fresh: Make, as_arrays: Make, root_key: Any
) -> None:
    plain = AdapterStore(f"memory://{uuid.uuid4().hex}")
    keys = np.frombuffer(b"".join(sorted(plain.key(f"user-{number}") for number in range(6))), np.uint8).reshape(-1, 16)
    records = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)
    writer = plain.begin("g1")
    writer.write_shared({"B": np.ones(2, np.float32)}, {})
    writer.write_segment(0, keys, records, np.ones(6, np.int32))
    writer.commit(expected_users=6, model=ModelRef(name="m", weight_hash="0"), adapter_config={})
    plain.put_fresh(replace(make_fresh("x", basis=plain.open_generation().basis), key=keys[1].tobytes(), record=records[0]))
    plain.erase(keys[4].tobytes())
    target = open_target(plain, f"memory://{uuid.uuid4().hex}", None, root_key)
    for _ in range(2):  # and again, for later erasures
        copied = copy_generation(plain, "g1", target, nobody_watches)
    assert copied.users == 5 and copied.encryption == "AES-256-GCM" and checked(target).problems == []
    reader = target.open_generation("g1")
    for row, key in enumerate(map(bytes, keys)):
        here, there = plain.pull(plain.open_generation(), key), target.pull(reader, key)
        assert (here is None) == (there is None) == (row == 4)
        assert here is None or here.record.tobytes() == there.record.tobytes()
    with pytest.raises(StoreError, match="is encrypted: give the root key"):
        open_target(target, f"memory://{uuid.uuid4().hex}")


@pytest.fixture
def kept(store: AdapterStore, make_users: Make, make_fresh: Make, publish: Make) -> AdapterStore:
    publish("g1", make_users(5))
    store.put_fresh(make_fresh("user-1"))
    store.erase(store.key("user-2"))
    return store


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(which=st.integers(0, 10**6), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), with_key=st.booleans())
def test_a_flipped_bit_in_any_object_of_an_encrypted_store_is_found_even_without_the_root_key(
    kept: AdapterStore, which: int, where: float, bit: int, with_key: bool
) -> None:
    looking = kept if with_key else AdapterStore(kept.uri, locked=True)
    paths = [item.path for item in kept.objects.list()]
    path = paths[which % len(paths)]
    sound = kept.objects.read(path)
    place = int(where * len(sound))
    kept.objects.write(path, sound[:place] + bytes([sound[place] ^ 1 << bit]) + sound[place + 1 :])
    try:
        assert path in {problem.path for problem in checked(looking).problems}
    finally:
        kept.objects.write(path, sound)


def test_the_check_tells_users_without_a_key_from_erased_ones_and_needs_no_root_key_for_it(kept: AdapterStore) -> None:
    locked = AdapterStore(kept.uri, locked=True)
    for store in (kept, locked):
        found = checked(store)
        assert found.problems == [] and found.unknown == [] and found.data_keys == 4
    lost = kept.key("user-3")
    kept.objects.delete(names.key_shard(lost[0]))
    holding = next(path for path in (names.segment("g1", wave) for wave in range(3)) if lost in kept.objects.read(path))
    for store in (kept, locked):
        problems = {problem.path: problem.what for problem in checked(store).problems}
        assert "has 1 users whose data keys are gone" in problems[holding]
    with pytest.raises(StoreError, match="is encrypted: set store.encryption"):
        locked.open_generation().get(kept.key("user-4"))
    version = locked.erase(kept.key("user-4"))
    assert version and not kept.keys.has(kept.key("user-4")), "erasing needs no root key"


def test_a_large_shard_is_read_by_one_range_and_whole_only_when_the_row_is_not_in_it(
    store: AdapterStore, make_fresh: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = np.random.default_rng(0).integers(0, 256, (3000, 16), dtype=np.uint8)
    drawn[:, 0] = 7
    users = [bytes(key) for key in drawn]
    made = dict(zip(users, store.keys.for_records(users), strict=True))
    adapter = replace(make_fresh("x", basis="1" * 64), key=users[5])
    store.put_fresh(adapter)
    size = len(store.objects.read(names.key_shard(7)))
    reading = AdapterStore(store.uri, encryption=RootKeySource(key_env="TEST_ROOT_KEY"))
    reading.keys.look_around()
    asked: list[int] = []
    read = reading.objects._backend.read

    def counted(path: str, start: int | None = None, stop: int | None = None) -> bytes:
        data = bytes(read(path, start, stop))
        asked.append(len(data) if path.startswith("keys/") else 0)
        return data

    monkeypatch.setattr(reading.objects._backend, "read", counted)
    standing = reading.fresh.read(users[5])
    part = reading.objects.read_ranges([reading.keys.range_of(users[5])])[0]
    assert reading.fresh.opened(standing.adapter, part).record.tobytes() == adapter.record.tobytes()
    assert 0 < sum(asked) < size / 5, "one range of a fifth at most"
    asked.clear()
    assert reading.keys.in_part(users[6], b"something else") == made[users[6]] and sum(asked) == size
    asked.clear()
    assert reading.keys.get_many(users[:3]) == {user: made[user] for user in users[:3]} and sum(asked) < size
    assert reading.keys.get_many([*users, bytes(16)]) == made
    reading.keys._sizes[7] = 40 * size  # far out of date
    assert reading.keys.get_many(users[:9]) == {user: made[user] for user in users[:9]}


@pytest.mark.parametrize("how", ["record", "fresh adapter", "many"])
def test_a_user_erased_between_the_reads_of_record_and_key_is_simply_not_served(
    how: str, store: AdapterStore, make_users: Make, publish: Make, make_fresh: Make, root_key: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish("g1", make_users(3))
    key, other = store.key("user-1"), AdapterStore(store.uri, encryption=root_key)
    reader = store.open_generation()
    if how == "fresh adapter":
        store.put_fresh(make_fresh("user-1", basis=reader.basis))
    read, erased = store.objects._backend.read, []

    def erased_meanwhile(path: str, *range_: int) -> bytes:
        if path.startswith("keys/") and not erased:
            erased.append(other.erase(key))
        return bytes(read(path, *range_))

    monkeypatch.setattr(store.objects._backend, "read", erased_meanwhile)
    assert (reader.get_many([key]) == {}) if how == "many" else (store.pull(reader, key) is None)
    assert erased
