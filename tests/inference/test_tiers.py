"""The tiers that adapters are found in: what is resident, what is on disk, who is pinned, and what happens without the store."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from cluster.s3_server import S3Server
from plora_ray.errors import ConfigError, StoreError
from plora_ray.inference import InferenceEngine, load_generation
from plora_ray.inference.cache import entry_bytes
from plora_ray.inference.disk_tier import DiskTier
from plora_ray.inference.observer import BatchDone, EngineObserver
from plora_ray.store import AdapterStore, UserAdapter, new_version
from plora_ray.store.adapters import now_iso
from tests.generations import DIM, publish

USERS = [f"person {index}" for index in range(20)]
TEXT = "a short text"
FOREVER_S = 3600.0


class Seen(EngineObserver):
    """Counts what the engine tells; `followed` is set whenever the background has read an adapter."""

    def __init__(self) -> None:
        self.lookups: Counter[str] = Counter()
        self.population: Counter[str] = Counter()
        self.batches: list[BatchDone] = []
        self.resident = 0
        self.pulled = threading.Semaphore(0)

    def on_lookups(self, tier: str, rows: int) -> None:
        self.lookups[tier] += rows

    def on_pull(self, seconds: float) -> None:
        self.pulled.release()

    def on_batch(self, batch: BatchDone) -> None:
        self.batches.append(batch)

    def on_population(self, reason: str, rows: int) -> None:
        self.population[reason] += rows

    def on_resident(self, users: int) -> None:
        self.resident = users

    def taken(self) -> dict[str, int]:
        """Lookups since the last call, by tier."""
        counts = {tier: rows for tier, rows in self.lookups.items() if rows}
        self.lookups.clear()
        return counts


Open = Callable[..., tuple[InferenceEngine, Seen]]


@pytest.fixture
def store(tmp_path: Path, tiny_plm: str) -> AdapterStore:
    store = AdapterStore(str(tmp_path / "store"))
    publish(store, tiny_plm, "g1", USERS)
    return store


@pytest.fixture
def open_engine(request: pytest.FixtureRequest) -> Iterator[Open]:
    """Opens engines over a store, each with its observer; closed at the end."""
    engines: list[InferenceEngine] = []

    def opened(store: AdapterStore, **options: object) -> tuple[InferenceEngine, Seen]:
        seen = Seen()
        engines.append(InferenceEngine(load_generation(store), observer=seen, **options))  # type: ignore[arg-type]
        return engines[-1], seen

    yield opened
    for engine in engines:
        engine.close()


def fresh(store: AdapterStore, user: str, value: float) -> UserAdapter:
    reader = store.open_generation()
    return UserAdapter(
        key=store.key(user), record=np.full(DIM, value, np.float32), examples=1, generation=reader.generation, version=new_version(),
        updated_at=now_iso(), source="fresh", basis=reader.basis,
    )  # fmt: skip


def records_folder(store: AdapterStore) -> Path:
    return Path(store.uri.removeprefix("file://")) / "generations" / "g1" / "segments"


def test_a_resident_generation_answers_as_the_store_does_and_asks_it_for_no_trained_user(store: AdapterStore, open_engine: Open) -> None:
    plain, _ = open_engine(store)
    engine, seen = open_engine(store, resident="on", max_age_s=FOREVER_S)
    rows = [(user, TEXT) for user in (*USERS, "nobody", USERS[0])]
    assert seen.resident == 20
    assert engine.predict(rows) == plain.predict(rows)
    assert seen.taken() == {"resident": 21, "none": 1}
    engine.predict(rows)
    assert seen.taken() == {"resident": 21, "unknown": 1}
    assert seen.population == {"no_adapter": 2}


def test_fresh_adapters_and_erasures_win_over_resident_records(store: AdapterStore, open_engine: Open) -> None:
    early = fresh(store, USERS[1], 2.0)
    store.put_fresh(early)
    engine, seen = open_engine(store, resident="on", max_age_s=FOREVER_S)
    keys = [store.key(user) for user in USERS[:4]]
    assert seen.pulled.acquire(timeout=10), "adapters that stood at the start are read in the background"
    assert np.array_equal(engine.cache.find(keys)[1].record, early.record)  # type: ignore[arg-type]
    admitted, elsewhere = fresh(store, USERS[2], 3.0), fresh(store, USERS[3], 4.0)
    engine.admit(admitted)
    store.put_fresh(elsewhere)
    assert np.array_equal(engine.cache.find(keys)[2].record, admitted.record)  # type: ignore[arg-type]
    assert np.array_equal(engine.cache.find(keys, elsewhere.version)[3].record, elsewhere.record), "the token makes it be seen at once"  # type: ignore[arg-type]
    store.erase(keys[0])
    store.tombstones()  # the readers of a store share what it knows
    engine.cache.evict([keys[0]])
    assert engine.cache.find(keys)[0].record is None and engine.predict([(USERS[0], TEXT)])[0].personalization == "population"


def test_an_adapter_stored_elsewhere_replaces_a_resident_record_within_its_time_though_nobody_asks(
    store: AdapterStore, open_engine: Open
) -> None:
    engine, seen = open_engine(store, resident="on", max_age_s=0.1)
    adapter = fresh(store, USERS[5], 3.0)
    store.put_fresh(adapter)
    assert seen.pulled.acquire(timeout=10)
    found = engine.cache.find([adapter.key])[0]
    assert np.array_equal(found.record, adapter.record)  # type: ignore[arg-type]


def test_a_fresh_adapter_that_could_not_be_read_is_read_again_and_the_older_one_serves_until_then(
    store: AdapterStore, open_engine: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    older, newer = fresh(store, USERS[5], 3.0), fresh(store, USERS[5], 4.0)
    store.put_fresh(older)
    engine, seen = open_engine(store, resident="on", max_age_s=0.1)
    assert seen.pulled.acquire(timeout=10)
    pull, failed, serving = engine.loaded.store.pull, threading.Event(), []

    def fails_once(reader: object, key: bytes, **options: object) -> UserAdapter | None:
        if not failed.is_set():
            failed.set()
            raise StoreError("away for a moment")
        serving.append(engine.cache._memory._standing(key))
        return pull(reader, key, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(engine.loaded.store, "pull", fails_once)
    store.put_fresh(newer)
    assert failed.wait(10) and seen.pulled.acquire(timeout=10)
    assert serving[0].adapter.version == older.version
    assert np.array_equal(engine.cache.find([newer.key])[0].record, newer.record)  # type: ignore[arg-type]


def test_a_fresh_adapter_older_than_the_generation_is_read_once_and_the_resident_record_serves(
    store: AdapterStore, open_engine: Open, tiny_plm: str
) -> None:
    store.put_fresh(fresh(store, USERS[0], 9.0))
    vectors = publish(store, tiny_plm, "g2", USERS)  # the same shared weights, a newer version
    engine, seen = open_engine(store, resident="on", max_age_s=FOREVER_S)
    assert seen.pulled.acquire(timeout=10)
    for _ in range(2):
        assert np.array_equal(engine.cache.find([store.key(USERS[0])])[0].record, vectors[USERS[0]])  # type: ignore[arg-type]
    assert seen.lookups["resident"] >= 1


def test_what_does_not_fit_the_budget_is_not_resident_or_is_an_error_that_says_so(store: AdapterStore, open_engine: Open) -> None:
    needed = len(USERS) * DIM * 4
    assert open_engine(store, resident="auto", cache_bytes=needed)[1].resident == 20
    assert open_engine(store, resident="auto", cache_bytes=needed - 1)[1].resident == 0
    with pytest.raises(ConfigError, match=f"take {needed:,} bytes and serving.cache_bytes is {needed - 1:,}: raise it"):
        open_engine(store, resident="on", cache_bytes=needed - 1)
    with pytest.raises(ConfigError, match="serving.pin_users_file names 3 users, whose adapters take .* raise it or name fewer"):
        open_engine(store, cache_bytes=3 * entry_bytes(DIM * 4) - 1, pinned=[store.key(user) for user in USERS[:3]])


def test_pinned_users_are_loaded_at_the_start_and_never_evicted_and_prefetched_ones_are_loaded(
    store: AdapterStore, open_engine: Open
) -> None:
    keys = [store.key(user) for user in USERS]
    engine, seen = open_engine(store, cache_bytes=5 * entry_bytes(DIM * 4), pinned=keys[:3], prefetched=keys[3:9], max_age_s=FOREVER_S)
    assert seen.taken() == {"store": 5}, "two prefetched users fit beside the pinned ones"
    for key in keys:
        engine.cache.find([key])
    seen.taken()
    engine.cache.find(keys[:3])
    assert seen.taken() == {"memory": 3}


def test_an_adapter_in_use_answers_although_everything_else_pushed_it_out(store: AdapterStore, open_engine: Open) -> None:
    engine, seen = open_engine(store, cache_bytes=2 * entry_bytes(DIM * 4), max_age_s=FOREVER_S)
    expected = engine.predict([(USERS[0], TEXT)])[0]
    gate, forward = threading.Event(), engine._batcher._forward

    def held(ids: object, records: object) -> object:
        gate.wait(10)
        return forward(ids, records)  # type: ignore[arg-type]

    engine._batcher._forward = held  # type: ignore[assignment]
    pending = engine.submit([(USERS[0], TEXT)])
    for user in USERS[1:]:
        engine.cache.find([store.key(user)])
    gate.set()
    assert engine.finish(pending, [future.result(10) for future in pending.logits])[0] == expected
    seen.taken()
    engine.cache.find([store.key(USERS[0])])
    assert seen.taken() == {"store": 1}, "it had been evicted meanwhile"


def test_the_disk_answers_after_a_restart_without_the_store_and_a_damaged_file_is_only_a_miss(
    store: AdapterStore, open_engine: Open, tmp_path: Path
) -> None:
    directory, key = tmp_path / "disk", store.key(USERS[0])
    first, seen = open_engine(store, disk=DiskTier(directory, 10_000), max_age_s=FOREVER_S)
    record = first.cache.find([key])[0].record
    assert seen.taken() == {"store": 1}
    again, seen = open_engine(store, disk=DiskTier(directory, 10_000), max_age_s=FOREVER_S)
    segments = records_folder(store)
    segments.rename(segments.with_name("away"))
    assert np.array_equal(again.cache.find([key])[0].record, record)  # type: ignore[arg-type]
    assert seen.taken() == {"disk": 1}
    segments.with_name("away").rename(segments)
    file = next(directory.glob(f"g1/*/{key.hex()}.record"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    last, seen = open_engine(store, disk=DiskTier(directory, 10_000), max_age_s=FOREVER_S)
    assert np.array_equal(last.cache.find([key])[0].record, record)  # type: ignore[arg-type]
    assert seen.taken() == {"store": 1} and file.read_bytes()[-1:] != b"\x7f"


def test_the_disk_stays_within_its_budget_dropping_what_was_used_longest_ago(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path / "disk", 3 * 100)
    keys = [bytes([number]) * 16 for number in range(4)]
    for key in keys[:3]:
        tier.put("g", key, b"x" * 100)
    assert tier.get("g", keys[0]) == b"x" * 100
    tier.put("g", keys[3], b"y" * 100)
    held = {path.stem for path in (tmp_path / "disk").rglob("*.record")}
    assert held == {key.hex() for key in (keys[0], keys[2], keys[3])} and tier.nbytes == 300
    assert DiskTier(tmp_path / "disk", 150).nbytes <= 150, "what is there from before is bounded, too"
    tier.put("g", keys[1], b"z" * 301)
    assert tier.get("g", keys[1]) is None
    (tmp_path / "a file").touch()
    with pytest.raises(ConfigError, match="serving.disk_cache_dir .* can't be used"):
        DiskTier(tmp_path / "a file" / "below", 100)


def test_an_erased_users_file_goes_at_once_or_when_the_next_process_starts(store: AdapterStore, open_engine: Open, tmp_path: Path) -> None:
    directory, keys = tmp_path / "disk", [store.key(user) for user in USERS[:2]]
    engine, _ = open_engine(store, disk=DiskTier(directory, 10_000), max_age_s=FOREVER_S)
    engine.cache.find(keys)
    store.erase(keys[0])
    engine.cache.evict([keys[0]])
    assert [path.stem for path in directory.rglob("*.record")] == [keys[1].hex()]
    store.erase(keys[1])
    open_engine(store, disk=DiskTier(directory, 10_000))
    assert not list(directory.rglob("*.record"))


@pytest.mark.parametrize("resident", ["on", "off"])
def test_a_damaged_record_is_answered_by_the_population_with_the_reason_and_logged_once(
    store: AdapterStore, open_engine: Open, caplog: pytest.LogCaptureFixture, resident: str
) -> None:
    segment = next(records_folder(store).iterdir())
    data = segment.read_bytes()
    segment.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    engine, seen = open_engine(store, resident=resident, max_age_s=FOREVER_S)
    last = max(USERS, key=store.key)  # whose record stands at the segment's end
    with caplog.at_level(logging.WARNING):
        answers = [engine.predict([(user, TEXT) for user in USERS]) for _ in range(3)]
    for answer in (dict(zip(USERS, answered, strict=True)) for answered in answers):
        assert (answer[last].personalization, answer[last].reason) == ("population", "adapter_corrupt")
        assert all(one.personalization == "adapter" for user, one in answer.items() if user != last)
    assert seen.population == {"adapter_corrupt": 3}
    assert len([record for record in caplog.records if "doesn't match its user's digest" in record.message]) == 1


def test_with_the_store_down_known_users_stay_personal_and_others_get_the_population_with_the_reason(
    tmp_path: Path, tiny_plm: str, open_engine: Open
) -> None:
    with S3Server(tmp_path / "s3") as server:
        store = AdapterStore(f"{server.create_bucket('adapters')}/store", server.storage_options, retry_s=0.2)
        publish(store, tiny_plm, "g1", USERS)
        store.put_fresh(fresh(store, USERS[1], 2.0))
        plain, seen = open_engine(store, max_age_s=0.01, unknown_ttl_s=0.0, store_wait_s=3.0)
        resident, _ = open_engine(store, resident="on", max_age_s=FOREVER_S)
        keys = [store.key(user) for user in USERS]
        before = [found.record for found in plain.cache.find(keys[:2])]
        assert np.array_equal(before, [found.record for found in resident.cache.find(keys[:2])])
    assert np.array_equal(before, [found.record for found in plain.cache.find(keys[:2])])
    answers = plain.predict([(user, TEXT) for user in (*USERS[:3], "nobody")])
    assert [(one.personalization, one.reason) for one in answers] == [("adapter", None)] * 2 + [("population", "store_unavailable")] * 2
    assert seen.population == {"store_unavailable": 2}
    assert np.array_equal(before, [found.record for found in resident.cache.find(keys[:2])])
    assert {one.personalization for one in resident.predict([(user, TEXT) for user in USERS])} == {"adapter"}
    assert resident.predict([("nobody", TEXT)])[0].reason == "store_unavailable"
