"""The format of key shards: rows read back, found alone in a range, and no byte of one can change unnoticed."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from plora_ray.errors import CorruptObjectError
from plora_ray.store import AdapterStore, RootKeySource, new_version
from plora_ray.store.encryption.ring import Ring
from plora_ray.store.encryption.sealing import SealBroken
from plora_ray.store.encryption.shards import ROW_BYTES, KeyRow, KeyShard, expected_range, find_row, version_bytes

RING, STORE = Ring({1: b"a" * 32, 2: b"b" * 32}), "5" * 32
EMPTY = KeyShard.decode(None, "none")


@st.composite
def people(draw: st.DrawFn) -> dict[bytes, tuple[bytes, bytes]]:
    """Data key and born_after by user."""
    users = draw(st.sets(st.binary(min_size=16, max_size=16), min_size=1, max_size=12))
    value = st.tuples(st.binary(min_size=32, max_size=32), st.binary(min_size=16, max_size=16))
    return {user: draw(value) for user in users}


def shard_of(users: dict[bytes, tuple[bytes, bytes]]) -> KeyShard:
    return EMPTY.with_rows([KeyRow.make(user, born, key, RING, STORE) for user, (key, born) in users.items()])


@settings(max_examples=60, deadline=None)
@given(people(), st.data())
def test_a_shard_reads_back_whatever_was_added_replaced_and_removed(users: dict[bytes, tuple[bytes, bytes]], data: st.DataObject) -> None:
    shard = shard_of(users)
    some = data.draw(st.sets(st.sampled_from(sorted(users))))
    gone = data.draw(st.sampled_from(sorted(users)))
    replaced = {user: (bytes(32), bytes(16)) for user in some}
    shard = KeyShard.decode(shard.encode(), "shard").with_rows([KeyRow.make(user, *reversed(replaced[user]), RING, STORE) for user in some])
    found = KeyShard.decode(shard.without(gone).encode(), "shard")
    expected = {user: value for user, value in {**users, **replaced}.items() if user != gone}
    assert len(found) == len(expected) and found.row(gone) is None
    for user, (key, born) in expected.items():
        row = found.row(user)
        assert row is not None and row.data_key(RING, STORE) == key and row.born_after == born and row == KeyRow.parse(row.dump())


@settings(max_examples=120, deadline=None)
@given(people(), st.data())
def test_any_changed_byte_of_a_shard_is_detected_and_a_row_alone_proves_itself(
    users: dict[bytes, tuple[bytes, bytes]], data: st.DataObject
) -> None:
    shard = shard_of(users)
    good = bytearray(shard.encode())
    good[data.draw(st.integers(0, len(good) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(CorruptObjectError):
        KeyShard.decode(bytes(good), "shard")
    row = bytearray(bytes(shard.rows[0]))
    row[data.draw(st.integers(0, ROW_BYTES - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises((SealBroken, KeyError)):
        KeyRow.parse(bytes(row)).data_key(RING, STORE)
    with pytest.raises(SealBroken):
        KeyRow.parse(bytes(shard.rows[0])).data_key(RING, "6" * 32)


def test_one_range_of_a_few_percent_finds_nearly_every_user_even_when_the_size_is_out_of_date() -> None:
    keys = np.random.default_rng(0).integers(0, 256, (20_000, 16), dtype=np.uint8)
    keys[:, 0] = 7
    rows = np.zeros((20_000, ROW_BYTES), np.uint8)
    rows[:, :16] = keys[np.lexsort(keys[:, ::-1].T)]
    data = KeyShard(rows).encode()
    for size, sure in ((len(data), 0.999), (len(data) - 50 * ROW_BYTES, 0.99)):
        found, read = 0, 0
        for row in rows[::20]:
            user = bytes(row[:16])
            start, stop = expected_range(user, size) or (0, 0)
            found += find_row(user, data[start:stop]) == KeyRow.parse(bytes(row))
            read += stop - start
        assert found >= sure * 1000 and read < 1000 * 0.04 * len(data)
    assert expected_range(bytes(16), 1000) is None, "a small shard is read whole"
    assert find_row(bytes(rows[5, :16]), data[: data.index(bytes(rows[5, :16])) + 40]) is None, "half a row is none"


def test_versions_and_their_bytes_sort_alike() -> None:
    versions = ["00000000000000000001-00000000", new_version(), new_version(), "90000000000000000000-ffffffff"]
    assert sorted(versions, key=version_bytes) == sorted(versions) and version_bytes(None) < version_bytes(versions[0])


def test_safetensors_reads_a_shard(tmp_path: object) -> None:
    path = f"{tmp_path}/00.safetensors"
    with open(path, "wb") as file:
        file.write(shard_of({b"u" * 16: (bytes(32), bytes(16))}).encode())
    with safe_open(path, "np") as shard:
        assert shard.get_tensor("rows").shape == (1, 96) and shard.metadata()["format_version"] == "1"


@pytest.mark.parametrize("place", ["file", "s3", "memory"], indirect=True)
def test_writers_who_meet_at_a_shard_agree_on_every_users_key(place: tuple[str, Any], root_key: RootKeySource) -> None:
    stores = [AdapterStore(*place, encryption=root_key) for _ in range(3)]
    users = [bytes([number % 2]) + bytes(14) + bytes([number]) for number in range(24)]
    told: list[dict[bytes, bytes]] = []

    def work(number: int) -> None:
        mine = users[number * 4 :] + users[: number * 2]
        told.append(dict(zip(mine, stores[number % 3].keys.for_records(mine), strict=True)))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    standing = stores[0].keys.get_many(users)
    assert len(told) == 6 and len(standing) == 24 and all(standing[user] == key for part in told for user, key in part.items())
