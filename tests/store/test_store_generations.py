"""Generations: they exist whole or not at all, on a folder, in memory and over S3 alike."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from plora_ray.errors import CorruptObjectError, StoreError
from plora_ray.store import AdapterStore, ModelRef, UserAdapter
from plora_ray.store.objects import ObjectRange

Make = Callable[..., Any]
WIDTH = 6
MODEL = ModelRef(name="mini", weight_hash="00")


def flip(store: AdapterStore, path: str, position: int) -> None:
    data = bytearray(store.objects.read(path))
    data[position] ^= 1
    store.objects.write(path, bytes(data))


def test_every_user_of_a_generation_reads_back_bit_exact(store: AdapterStore, make_users: Make, publish: Make) -> None:
    users = make_users(50)
    publish("g1", users)
    assert store.current() == "g1"
    reader = store.open_generation()
    assert (reader.users, list(reader.keys())) == (50, sorted(users))
    assert reader.index_bytes == 36 * 50
    many = reader.get_many(list(users) + [store.key("stranger")])
    assert set(many) == set(users)
    for key, (record, examples) in users.items():
        for adapter in (reader.get(key), many[key], store.pull(reader, key)):
            assert adapter is not None and adapter.record.tobytes() == record.tobytes() and adapter.examples == examples
            assert (adapter.key, adapter.source, adapter.generation, adapter.basis) == (key, "generation", "g1", reader.basis)
    assert reader.get(store.key("stranger")) is None and store.pull(reader, store.key("stranger")) is None
    shared = reader.shared()
    assert torch.equal(shared.tensors["B"], torch.ones(4, 2)) and shared.metadata == {"note": "test"}
    assert [(info.generation, info.users, info.is_current) for info in store.generations()] == [("g1", 50, True)]


def test_lookup_agrees_with_a_dictionary(make_users: Make, publish: Make, store: AdapterStore) -> None:
    users = make_users(300)
    publish("g1", users)
    reader = store.open_generation()
    positions = {key: position for position, key in enumerate(sorted(users))}
    generator = np.random.default_rng(1)
    near = [key[:15] + bytes([key[15] ^ 1]) for key in users]
    strangers = [generator.bytes(16) for _ in range(200)] + [b"\0" * 16, b"\xff" * 16] + near
    for key in [*users, *strangers]:
        assert reader.lookup(key) == positions.get(key)
    erased, asked = next(iter(users)), [*users, *strangers]
    store.erase(erased)
    store.tombstones()
    found = reader.lookup_many(asked)
    assert found.tolist() == [-1 if key == erased else positions.get(key, -1) for key in asked]
    assert reader.lookup(erased) is None and reader.position(erased) == positions[erased]


def test_all_records_come_in_bounded_pieces_in_the_order_of_positions_and_damaged_ones_are_marked(
    store: AdapterStore, make_users: Make, publish: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plora_ray.store.reader.MAX_RANGE_BYTES", 7 * WIDTH * 4)
    users = make_users(50)
    publish("g1", users)
    reader = store.open_generation()
    ordered = sorted(users)
    path = reader.manifest.segments[1].path
    flip(store, path, len(store.objects.read(path)) - 1)  # the last record of the second of three segments: position 33
    blocks = list(reader.records())
    assert all(len(block.records) <= 7 for block in blocks)
    assert [block.first for block in blocks] == np.cumsum([0, *(len(block.records) for block in blocks)])[:-1].tolist()
    proven = np.concatenate([block.proven for block in blocks])
    assert np.flatnonzero(~proven).tolist() == [33]
    records = np.concatenate([block.records for block in blocks])
    assert all(records[place].tobytes() == users[key][0].tobytes() for place, key in enumerate(ordered) if place != 33)
    store.objects.delete(path)
    assert np.flatnonzero(~np.concatenate([block.proven for block in reader.records()])).tolist() == list(range(17, 34))


def test_a_record_kept_nearer_saves_the_read_and_one_that_is_damaged_there_is_read_anew(
    store: AdapterStore, make_users: Make, publish: Make
) -> None:
    class Near(dict[bytes, bytes]):
        put, drop = dict.__setitem__, dict.pop

    users, near = make_users(10), Near()
    publish("g1", users)
    reader, (key, other) = store.open_generation(), sorted(users)[:2]
    assert store.pull(reader, key, records=near).record.tobytes() == users[key][0].tobytes()
    assert (near[key] == users[key][0].tobytes()) != store.encrypted, "what is near is the record as it is stored"
    near[other] = near[key]  # another user's bytes prove nothing for this one
    assert store.pull(reader, other, records=near).record.tobytes() == users[other][0].tobytes() and near[other] != near[key]
    store.objects.delete(reader.manifest.segments[0].path)
    found = store.pull(reader, key, records=near, may_be_fresh=False)
    assert found.record.tobytes() == users[key][0].tobytes()
    store.erase(key)
    assert key in store.fresh_tags() and store.pull(reader, key, records=near) is None
    store.tombstones()
    assert store.pull(reader, key, records=near, may_be_fresh=False) is None


def test_a_generation_without_a_manifest_does_not_exist(store: AdapterStore, make_users: Make, publish: Make, write_waves: Make) -> None:
    publish("old", make_users(10))
    writer = store.begin("new")
    writer.write_shared({"B": np.ones(3, np.float32)}, {})
    write_waves(writer, make_users(10, seed=1))
    del writer  # the writer is killed before its manifest
    assert [info.generation for info in store.generations()] == ["old"]
    assert store.current() == "old" and store.open_generation().generation == "old"
    with pytest.raises(StoreError, match="no generation new; it has old"):
        store.activate("new")
    with pytest.raises(StoreError, match="no generation new; it has old"):
        store.open_generation("new")


def test_a_restarted_writer_skips_finished_waves_and_repairs_damaged_ones(store: AdapterStore, make_users: Make, write_waves: Make) -> None:
    users = make_users(12)
    writer = store.begin("g1")
    writer.write_shared({"B": np.ones(3, np.float32)}, {})
    write_waves(writer, users)
    first = writer.finished_waves()
    flip(store, "generations/g1/segments/00001.safetensors", 500)
    data = store.objects.read("generations/g1/segments/00002.safetensors")
    store.objects.write("generations/g1/segments/00002.safetensors", data[:-3])
    again = store.begin("g1")
    assert again.finished_waves() == {0: first[0]} and again.version == writer.version
    assert again.shared_ref() == writer.shared_ref() is not None
    with pytest.raises(StoreError, match="4 users in 1 finished waves, expected 12"):
        again.commit(expected_users=12, model=MODEL, adapter_config={})
    assert store.generations() == []
    write_waves(again, users)
    mended = again.finished_waves()
    assert mended == first if not store.encrypted else mended.keys() == first.keys(), "sealed records never have the same bytes twice"
    assert again.commit(expected_users=12, model=MODEL, adapter_config={}).users == 12


def test_a_generation_is_resumed_without_a_write_and_only_if_it_was_begun(store: AdapterStore) -> None:
    with pytest.raises(StoreError, match="never begun"):
        store.resume("g1")
    begun = store.begin("g1")
    before = store.objects.list()
    assert store.resume("g1").version == begun.version and store.objects.list() == before


def test_the_first_acknowledged_segment_of_a_wave_wins(store: AdapterStore, make_users: Make, as_arrays: Make) -> None:
    keys, records, examples = as_arrays(make_users(4))
    writer = store.begin("g1")
    writer.write_shared({"B": np.ones(3, np.float32)}, {})
    first = writer.write_segment(0, keys, records, examples)
    assert writer.write_segment(0, keys, records, examples) == first
    assert store.begin("g1").write_segment(0, keys, records + 1, examples) == first
    assert writer.finished_waves() == {0: first}


def test_of_two_writers_of_one_wave_both_are_told_the_same(store: AdapterStore, make_users: Make, as_arrays: Make) -> None:
    keys, records, examples = as_arrays(make_users(4))
    writer = store.begin("g1")
    writer.write_shared({"B": np.ones(3, np.float32)}, {})
    told: list[str] = []
    threads = [
        threading.Thread(target=lambda shift=shift: told.append(writer.write_segment(0, keys, records + shift, examples).sha256))
        for shift in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(told) == 4 and set(told) == {writer.finished_waves()[0].sha256}


def test_records_with_nan_are_refused_and_nothing_is_written(
    store: AdapterStore, make_users: Make, make_fresh: Make, as_arrays: Make
) -> None:
    keys, records, examples = as_arrays(make_users(4))
    writer = store.begin("g1")
    before = store.objects.list()
    records[2, 1] = np.nan
    with pytest.raises(StoreError, match="1 of 4 records hold NaN"):
        writer.write_segment(0, keys, records, examples)
    with pytest.raises(StoreError, match="NaN or infinite"):
        store.put_fresh(make_fresh("u", value=np.nan))
    with pytest.raises(StoreError, match="NaN or infinite"):
        writer.write_shared({"B": np.array([np.inf], np.float32)}, {})
    assert store.objects.list() == before


def test_only_one_of_two_writers_publishes_a_generation(store: AdapterStore, make_users: Make, write_waves: Make) -> None:
    users = make_users(6)
    one, two = store.begin("g1"), store.begin("g1")
    for writer in (one, two):
        writer.write_shared({"B": np.ones(3, np.float32)}, {})
        write_waves(writer, users)
    one.commit(expected_users=6, model=MODEL, adapter_config={}, segments=one.finished_waves())
    one.commit(expected_users=6, model=MODEL, adapter_config={})
    with pytest.raises(StoreError, match="another writer published generation g1"):
        two.commit(expected_users=6, model=MODEL, adapter_config={})
    with pytest.raises(StoreError, match="published already"):
        store.begin("g1")


def test_waves_that_overlap_or_differ_in_width_are_not_published(store: AdapterStore, make_users: Make, as_arrays: Make) -> None:
    keys, records, examples = as_arrays(make_users(6))
    writer = store.begin("g1")
    writer.write_shared({"B": np.ones(3, np.float32)}, {})
    writer.write_segment(0, keys[:4], records[:4], examples[:4])
    writer.write_segment(1, keys[3:], records[3:], examples[3:])
    with pytest.raises(StoreError, match="waves 0 and 1 overlap"):
        writer.commit(expected_users=7, model=MODEL, adapter_config={})
    other = store.begin("g2")
    with pytest.raises(StoreError, match="no shared weights yet"):
        other.commit(expected_users=0, model=MODEL, adapter_config={})
    other.write_shared({"B": np.ones(3, np.float32)}, {})
    other.write_segment(0, keys[:3], records[:3], examples[:3])
    other.write_segment(1, keys[3:], records[3:, :2], examples[3:])
    with pytest.raises(StoreError, match="different widths"):
        other.commit(expected_users=6, model=MODEL, adapter_config={})
    with pytest.raises(StoreError, match="other shared weights already"):
        other.write_shared({"B": np.zeros(3, np.float32)}, {})
    assert store.generations() == [] and store.current() is None


def test_damage_to_a_published_generation_is_never_served(store: AdapterStore, make_users: Make, publish: Make) -> None:
    users = make_users(9)
    publish("g1", users)
    reader = store.open_generation()
    segment = reader.manifest.segments[0]
    key = bytes.fromhex(segment.first_key)
    flip(store, segment.path, segment.index_bytes + 2)
    with pytest.raises(CorruptObjectError, match="digest"):
        reader.get(key)
    with pytest.raises(CorruptObjectError, match="digest"):
        store.pull(reader, key)
    store.objects.write(segment.path, store.objects.read(segment.path)[: segment.index_bytes + 4])
    with pytest.raises(CorruptObjectError, match="shorter"):
        reader.get(key)
    store.objects.delete(segment.path)
    with pytest.raises(CorruptObjectError, match="gone"):
        reader.get(key)
    with pytest.raises(CorruptObjectError, match="gone"):
        store.open_generation()
    flip(store, reader.manifest.shared.path, 100)
    with pytest.raises(CorruptObjectError, match="not what generation g1 published"):
        store.open_generation()


def test_a_segment_of_another_generation_is_not_accepted_in_its_place(store: AdapterStore, make_users: Make, publish: Make) -> None:
    users = make_users(9)
    publish("g1", users)
    publish("g2", {key: (record + 1, examples) for key, (record, examples) in users.items()})
    store.objects.write("generations/g2/segments/00000.safetensors", store.objects.read("generations/g1/segments/00000.safetensors"))
    with pytest.raises(CorruptObjectError, match="isn't the segment that generation g2 published"):
        store.open_generation("g2")


def test_activation_goes_forward_and_back(store: AdapterStore, make_users: Make, publish: Make) -> None:
    for generation in ("g1", "g2"):
        publish(generation, make_users(3))
    assert store.current() == "g2"
    store.activate("g1")
    assert store.current() == "g1" and store.open_generation().generation == "g1"
    for bad in ("../g1", "", ".", "a/b", "x" * 65):
        with pytest.raises(StoreError, match="can't name a generation"):
            store.activate(bad)


def test_a_generation_without_users_serves_the_population_only(store: AdapterStore, publish: Make) -> None:
    writer = store.begin("g1")
    writer.write_shared({"B": np.ones(3, np.float32)}, {})
    writer.commit(expected_users=0, model=MODEL, adapter_config={})
    reader = store.open_generation()
    assert reader.users == 0 and list(reader.keys()) == [] and reader.get(store.key("u")) is None


def test_side_objects_lie_beside_the_generation_under_harmless_names_only(store: AdapterStore) -> None:
    writer = store.begin("g1")
    assert store.objects.read(writer.write_side_object("report.json", b"{}").path) == b"{}"
    for bad in ("manifest.json", "shared.safetensors", "begun.json", "../x.json", "a/b.json", ".x"):
        with pytest.raises(StoreError, match="can't name a side object"):
            writer.write_side_object(bad, b"")


def test_a_cold_user_costs_two_requests_and_a_third_for_the_data_key_where_there_is_one(
    store: AdapterStore, make_users: Make, publish: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = make_users(40)
    publish("g1", users)
    reader = store.open_generation()
    asked: list[str] = []
    read = store.objects._backend.read
    monkeypatch.setattr(store.objects._backend, "read", lambda path, *range_: asked.append(path) or read(path, *range_))
    store.pull(reader, next(iter(users)))
    assert sorted(path.split("/")[0] for path in asked) == ["generations", *(["keys"] if store.encrypted else []), "users"]
    asked.clear()
    assert len(reader.get_many(users)) == 40
    segments, shards = [path for path in asked if "segments" in path], {key[0] for key in users} if store.encrypted else set()
    assert len(segments) == 3 and len(asked) == 3 + len(shards)  # one request a segment and key shard, not one a user


def test_adapters_far_apart_are_fetched_by_separate_ranges(
    store: AdapterStore, make_users: Make, publish: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = make_users(30)
    publish("g1", users)
    reader = store.open_generation()
    monkeypatch.setattr("plora_ray.store.reader.MAX_GAP_BYTES", 2 * WIDTH * 4)
    chosen = sorted(users)[0:10:9] + sorted(users)[20:23]
    ranges: list[ObjectRange] = []
    read_ranges = store.objects.read_ranges
    monkeypatch.setattr(store.objects, "read_ranges", lambda wanted: ranges.extend(wanted) or read_ranges(wanted))
    found = reader.get_many(chosen)
    ranges = [item for item in ranges if item.path.startswith("generations/")]
    assert len(ranges) == 3 and all(found[key].record.tobytes() == users[key][0].tobytes() for key in chosen)


def test_one_reader_serves_many_threads(store: AdapterStore, make_users: Make, publish: Make) -> None:
    users = make_users(24)
    publish("g1", users)
    reader = store.open_generation()
    wrong: list[bytes] = []

    def read_all(order: int) -> None:
        for key in sorted(users)[order::4]:
            adapter: UserAdapter | None = store.pull(reader, key)
            if adapter is None or adapter.record.tobytes() != users[key][0].tobytes():
                wrong.append(key)

    threads = [threading.Thread(target=read_all, args=(order,)) for order in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_fresh_adapter_is_served_only_with_the_shared_weights_it_was_fitted_to(
    store: AdapterStore, make_users: Make, publish: Make, make_fresh: Make
) -> None:
    users = make_users(3)
    publish("g1", users, shared_value=1.0)
    reader = store.open_generation()
    fresh = make_fresh("user-0", basis=reader.basis)
    store.put_fresh(fresh)
    served = store.pull(reader, fresh.key)
    assert served is not None and served.source == "fresh" and served.record.tobytes() == fresh.record.tobytes()
    publish("g2", users, shared_value=2.0)
    later = store.pull(store.open_generation("g2"), fresh.key)
    assert later is not None and later.source == "generation" and later.generation == "g2"
    publish("g3", users, shared_value=1.0)  # the same shared weights, users trained again since
    retrained = store.pull(store.open_generation("g3"), fresh.key)
    assert retrained is not None and retrained.source == "generation"
    assert store.pull(store.open_generation("g1"), fresh.key).source == "fresh"
    newcomer = replace(make_fresh("newcomer", basis=reader.basis))
    store.put_fresh(newcomer)
    assert store.pull(reader, newcomer.key).version == newcomer.version
