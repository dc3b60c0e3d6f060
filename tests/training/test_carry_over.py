"""Planning a generation from the one before, on a store in memory and plain dictionaries: who is fitted, carried, taken in, left out."""

from __future__ import annotations

import hashlib
import tracemalloc
import uuid
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plora_ray.adapters.labels import LabelSpace
from plora_ray.adapters.pretrained import weight_hash
from plora_ray.config import parse_settings
from plora_ray.data.stats import PartitionStats
from plora_ray.data.table import PartitionTable
from plora_ray.data.trained_users import TrainedUsers, trained_users
from plora_ray.errors import DataError, StoreError
from plora_ray.identity import partition_of
from plora_ray.store import AdapterStore, ModelRef, ObjectStore, RootKeySource, UserAdapter, names, new_version
from plora_ray.store.folding import FreshSnapshot, raise_late_versions
from plora_ray.store.row_digests import read_row_digests
from plora_ray.training.carry_over import Base, plan_new_data
from plora_ray.training.memory import ModelSize, wave_bytes
from plora_ray.training.plan import Action, PartitionPlan
from plora_ray.training.prepare import Prepared
from plora_ray.training.progress import ProgressLine
from plora_ray.training.publish import finish
from plora_ray.training.rank import Assignment, start_at
from plora_ray.training.run_state import RunState
from plora_ray.training.user_table import UserTable
from plora_ray.training.wave_users import SegmentUsers, WaveUsers
from plora_ray.training.waves import Wave, WaveLimits
from tests.generations import publish

WIDTH, PARTITIONS = 3, 4
LIMITS = WaveLimits(3, 2**30, lambda users, rows, copied: users + rows + copied)


def key_of(user: int) -> bytes:
    return hashlib.blake2b(str(user).encode(), digest_size=16).digest()


def digest_of(rows: int) -> bytes:
    return hashlib.blake2b(f"rows {rows}".encode(), digest_size=16).digest()


def as_rows(items: list[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(items), np.uint8).reshape(-1, 16)


def publish_base(store: AdapterStore, users: dict[int, int | None]) -> Base:
    """A generation of `users`: the number that stands for a user's rows, None where the store doesn't know them."""
    writer = store.begin("base")
    writer.write_shared({"B": np.ones(2, np.float32)}, {})
    order = sorted(users, key=key_of)
    keys = as_rows([key_of(user) for user in order])
    if users:
        known = [user for user in order if users[user] is not None]
        writer.write_row_digests(0, as_rows([key_of(user) for user in known]), as_rows([digest_of(users[user] or 0) for user in known]))
        writer.write_segment(0, keys, np.array([[user] * WIDTH for user in order], np.float32), np.full(len(order), 7, np.int32))
    writer.commit(expected_users=len(users), model=ModelRef(name="m", weight_hash="0"), adapter_config={})
    return Base(store.open_generation(), LabelSpace("regression"))


def put_fresh(store: AdapterStore, base: Base, user: int, basis: str | None = None, version: str | None = None) -> UserAdapter:
    adapter = UserAdapter(
        key_of(user), np.full(WIDTH, -user, np.float32), 4, "base", version or new_version(), "now", "fresh", basis or base.reader.basis
    )
    store.put_fresh(adapter)
    return adapter


def source(users: dict[int, int], partition: int) -> TrainedUsers:
    order = [user for user in sorted(users, key=key_of) if partition_of(key_of(user), PARTITIONS) == partition]
    digests = as_rows([digest_of(users[user]) for user in order])
    return TrainedUsers(as_rows([key_of(user) for user in order]), digests, np.array([users[user] for user in order], np.int32))


user_rows = st.dictionaries(st.integers(1, 40), st.integers(1, 3), max_size=20)


@settings(max_examples=60, deadline=None)
@given(
    had=st.dictionaries(st.integers(1, 40), st.none() | st.integers(1, 3), max_size=20),
    now=user_rows,
    fresh=st.sets(st.integers(1, 45), max_size=8),
    foreign=st.sets(st.integers(1, 45), max_size=4),
    erased=st.sets(st.integers(1, 40), max_size=5),
)
def test_exactly_the_users_with_new_rows_are_fitted_and_everybody_else_comes_over_unchanged(
    had: dict[int, int | None], now: dict[int, int], fresh: set[int], foreign: set[int], erased: set[int]
) -> None:
    store = AdapterStore(f"memory://{uuid.uuid4().hex}")
    base = publish_base(store, had)
    for user in fresh:
        put_fresh(store, base, user)
    for user in foreign - fresh:
        put_fresh(store, base, user, basis="0" * 64)
    for user in erased:
        store.erase(key_of(user))
    plans: dict[int, PartitionPlan] = {}
    plan, _ = plan_new_data(store, base, lambda partition: source(now, partition), PARTITIONS, LIMITS, plans.__setitem__)

    everybody = (set(had) | set(now) | fresh) - erased
    fitted = {user for user in set(now) - erased if user not in had or had[user] != now[user]}
    folded = (fresh - erased) - fitted
    assert (plan.fitted, plan.new) == (len(fitted), len(fitted - set(had)))
    assert (plan.carried, plan.folded, plan.erased) == (len(everybody - fitted - folded), len(folded), len(set(now) & erased))
    assert plan.training_rows == sum(now[user] for user in fitted)

    writer = store.begin("next")
    writer.copy_shared(store.objects.read(base.reader.manifest.shared.path))
    users, told = WaveUsers(plans, base.reader, writer), []
    for wave in plan.waves:
        keys = users.to_fit(wave)
        records, examples = np.full((len(keys), WIDTH), 1000, np.float32), np.full(len(keys), 9, np.int32)
        users.write(wave, SegmentUsers(keys, records, examples), users.unchanged(wave, store.tombstones().keys()), told.append)
    writer.commit(expected_users=len(everybody), model=ModelRef(name="m", weight_hash="0"), adapter_config={})
    reader = store.open_generation()
    assert {segment.sha256 for segment in reader.manifest.segments} == {segment for segment in told if segment}
    assert reader.basis == base.reader.basis and {key_of(user) for user in everybody} == set(reader.keys())
    for user in everybody:
        adapter = reader.get(key_of(user))
        value, examples = (1000, 9) if user in fitted else (-user, 4) if user in folded else (user, 7)
        assert adapter is not None and adapter.record.tolist() == [value] * WIDTH and adapter.examples == examples
    remembered = dict(zip(*([row.tobytes() for row in part] for part in read_row_digests(store.objects, "next")), strict=True))
    rows = {**{user: rows for user, rows in had.items() if rows is not None}, **now}
    assert remembered == {key_of(user): digest_of(rows[user]) for user in everybody if user in rows}
    plans.clear()
    again, _ = plan_new_data(
        store, Base(reader, base.labels), lambda partition: source(now, partition), PARTITIONS, LIMITS, plans.__setitem__
    )
    assert (again.fitted, again.folded, again.carried) == (0, 0, len(everybody)), "nothing is new the second time"


def test_a_fresh_adapter_stored_after_the_plan_by_a_clock_that_is_behind_still_wins() -> None:
    store = AdapterStore(f"memory://{uuid.uuid4().hex}")
    base = publish_base(store, {1: 1, 2: 2, 3: 3})
    put_fresh(store, base, 1)
    before = FreshSnapshot.take(store.objects)
    behind = new_version()
    version = store.begin("next").version
    late, late_elsewhere = put_fresh(store, base, 2, version=behind), put_fresh(store, base, 3, basis="0" * 64, version=behind)
    untouched = store.get_fresh(key_of(1))
    assert raise_late_versions(store.objects, before.seen, base.reader.basis, version) == 1
    assert raise_late_versions(store.objects, before.seen, base.reader.basis, version) == 0
    raised, known = store.get_fresh(late.key), store.get_fresh(key_of(1))
    assert raised is not None and raised.version > version and raised.record.tobytes() == late.record.tobytes()
    assert store.get_fresh(late_elsewhere.key).version == behind  # type: ignore[union-attr]
    assert known is not None and untouched is not None and known.version == untouched.version


@pytest.mark.parametrize("raise_before", ["the tombstone", "the fresh object is emptied", "the next read"])
def test_a_user_erased_around_the_raise_of_late_versions_stays_erased(raise_before: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = AdapterStore(f"memory://{uuid.uuid4().hex}")
    base = publish_base(store, {1: 1})
    behind, seen = new_version(), FreshSnapshot.take(store.objects).seen
    writer = store.begin("next")
    writer.copy_shared(store.objects.read(base.reader.manifest.shared.path))
    writer.commit(expected_users=0, model=ModelRef(name="m", weight_hash="0"), adapter_config={})
    late = put_fresh(store, base, 1, version=behind)
    first_write = {"the tombstone": names.tombstone(late.key), "the fresh object is emptied": names.fresh(late.key)}.get(raise_before)
    update, raised = store.objects.update, []

    def raise_late() -> None:
        raised.append(raise_late_versions(ObjectStore(store.uri), seen, base.reader.basis, writer.version))

    def interrupted(path: str, change: Callable[[bytes | None], bytes | None]) -> bytes | None:
        if path == first_write:
            raise_late()
        return update(path, change)

    monkeypatch.setattr(store.objects, "update", interrupted)
    store.erase(late.key)
    if first_write is None:
        raise_late()
    assert raised == [raise_before == "the tombstone"]
    assert store.pull(store.open_generation(), late.key) is None and store.get_fresh(late.key) is None and store.is_erased(late.key)


def test_an_eraser_that_dies_after_the_tombstone_leaves_nothing_that_a_raise_could_bring_back(monkeypatch: pytest.MonkeyPatch) -> None:
    store = AdapterStore(f"memory://{uuid.uuid4().hex}")
    base = publish_base(store, {})
    seen = FreshSnapshot.take(store.objects).seen
    late = put_fresh(store, base, 1, version=new_version())
    version = new_version()
    with monkeypatch.context() as patch:
        update = store.objects.update
        patch.setattr(store.objects, "update", lambda path, change: update(path, change) if path == names.tombstone(late.key) else None)
        store.erase(late.key)
    assert store.get_fresh(late.key) is not None, "the eraser died before it emptied the fresh object"
    assert raise_late_versions(store.objects, seen, base.reader.basis, version) == 0
    assert store.pull(store.open_generation(), late.key) is None and store.is_erased(late.key)


def test_an_eraser_whose_clock_is_behind_the_generation_empties_an_adapter_that_was_raised_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = AdapterStore(f"memory://{uuid.uuid4().hex}")
    base = publish_base(store, {})
    seen = FreshSnapshot.take(store.objects).seen
    late = put_fresh(store, base, 1, version=new_version())
    ahead = new_version(after=f"{2 * int(late.version[:20]):020d}-00000000")
    update = store.objects.update

    def interrupted(path: str, change: Callable[[bytes | None], bytes | None]) -> bytes | None:
        if path == names.tombstone(late.key):
            assert raise_late_versions(ObjectStore(store.uri), seen, base.reader.basis, ahead) == 1
        return update(path, change)

    monkeypatch.setattr(store.objects, "update", interrupted)
    store.erase(late.key)
    assert store.get_fresh(late.key) is None and store.is_erased(late.key)


def test_a_raised_version_stays_below_every_erasure_of_a_later_time() -> None:
    store = AdapterStore(f"memory://{uuid.uuid4().hex}")
    base = publish_base(store, {})
    seen = FreshSnapshot.take(store.objects).seen
    late = put_fresh(store, base, 1, version=new_version())
    version, later = new_version(), new_version()
    raise_late_versions(store.objects, seen, base.reader.basis, version)
    raised = store.get_fresh(late.key)
    assert raised is not None and version < raised.version < later


def test_row_digests_depend_on_tokens_labels_and_the_key_but_not_on_the_order_of_rows() -> None:
    def table(rows: list[tuple[list[int], str, int]]) -> PartitionTable:
        """One user's rows: tokens, label, split."""
        lengths = [len(tokens) for tokens, _, _ in rows]
        return PartitionTable(
            keys=as_rows([key_of(1)]),
            user_offsets=np.array([0, len(rows)]),
            tokens=np.array([token for tokens, _, _ in rows for token in tokens], np.int32),
            row_offsets=np.cumsum([0, *lengths]),
            labels=np.array([label for _, label, _ in rows], object),
            split=np.array([split for _, _, split in rows], np.int8),
            timestamps=np.full(len(rows), np.datetime64("NaT"), "datetime64[us]"),
        )

    def digest(rows: list[tuple[list[int], str, int]], secret: bytes = b"s" * 16) -> bytes:
        return trained_users(table(rows), secret).digests.tobytes()

    first, second, tested = ([1, 2], "a", 0), ([3], "b", 0), ([9], "a", 2)
    known = digest([first, second])
    assert digest([second, first]) == digest([first, second, tested]) == known
    assert trained_users(table([first, second, tested]), b"s" * 16).rows.tolist() == [2]
    validated = [first, second, ([9], "a", 1)]
    others = [validated, [first], [first, first, second], [([1, 2], "b", 0), second], [([1], "a", 0), ([2, 3], "b", 0)], [tested]]
    assert known not in [digest(rows) for rows in others] and digest([first, second], b"t" * 16) != known


def test_a_warm_start_puts_users_at_their_vectors_and_leaves_new_ones_at_zero() -> None:
    base = publish_base(AdapterStore(f"memory://{uuid.uuid4().hex}"), {1: 1, 2: 2, 3: 3})
    table = UserTable(4, WIDTH, learning_rate=1.0)
    start_at(base.reader, as_rows([key_of(user) for user in (2, 9, 3, 1)]), table)
    assert table.vectors[:, 0].tolist() == [2, 0, 3, 1]


def test_a_generation_succeeds_its_base_only_while_that_one_serves() -> None:
    store = AdapterStore(f"memory://{uuid.uuid4().hex}")
    publish_base(store, {1: 1})
    for name in ("other", "next"):
        writer = store.begin(name)
        writer.write_shared({"B": np.ones(2, np.float32)}, {})
        writer.commit(expected_users=0, model=ModelRef(name="m", weight_hash="0"), adapter_config={}, activate=False)
    assert store.current() == "base"
    store.activate("other")
    assert not store.succeed("base", "next") and store.current() == "other"
    store.activate("base")
    assert store.succeed("base", "next") and store.succeed("base", "next") and store.current() == "next"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"adapter": {"rank": 8, "alpha": 8.0, "user_dim": 8}}, r"another rank \(4 then, 8 now\)"),
        ({"adapter": {"rank": 4, "alpha": 8.0, "user_dim": 8, "targets": ["query"]}}, "another targets"),
        ({"model": {"max_length": 16}}, r"another max_length \(32 then, 16 now\)"),
        ({"task": "regression"}, "another task"),
    ],
)
def test_a_base_of_another_shape_is_refused_with_what_differs(tiny_tree: dict[str, Any], changed: dict[str, Any], message: str) -> None:
    store = AdapterStore(f"memory://{uuid.uuid4().hex}")
    plm = tiny_tree["model"]["name"]
    with pytest.raises(StoreError, match="no generation to start from"):
        Base.open(store, parse_settings(tiny_tree), weight_hash(plm))
    publish(store, plm, "g1", ["ann"])
    base = Base.open(store, parse_settings(tiny_tree), weight_hash(plm))
    assert base.reader.generation == "g1" and base.labels.classes == ("no", "perhaps", "yes")
    with pytest.raises(StoreError, match="another weights of the model"):
        Base.open(store, parse_settings(tiny_tree), "0" * 64)
    merged = {**tiny_tree, **changed, "model": {**tiny_tree["model"], **changed.get("model", {})}}
    with pytest.raises(StoreError, match=f"generation g1 was trained with {message}.*train a new population"):
        Base.open(store, parse_settings(merged), weight_hash(plm))
    counts = {"train": {"no": 3, "never": 1}, "validation": {}, "test": {"yes": 1}}
    with pytest.raises(DataError, match="'never' are new to generation g1"):
        base.refuse_new_labels(PartitionStats(digest="", partitions=[], label_counts=counts, skipped={}))


def test_a_published_generation_says_so_and_waits_when_another_one_took_over_from_its_base(
    tiny_tree: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    store = AdapterStore(f"memory://{uuid.uuid4().hex}")
    base = publish_base(store, {1: 1})
    for name in ("g2", "meanwhile"):
        writer = store.begin(name)
        writer.copy_shared(store.objects.read(base.reader.manifest.shared.path))
        writer.commit(expected_users=0, model=ModelRef(name="m", weight_hash="0"), adapter_config={}, activate=name == "meanwhile")
    tree = {**tiny_tree, "training": {**tiny_tree["training"], "only_users_with_new_data": True}}
    plan, snapshot = plan_new_data(store, base, lambda partition: source({1: 1}, partition), PARTITIONS, LIMITS, lambda *_: None)
    run = RunState(store.objects, "run")
    run.plan.save(plan, snapshot.seen)
    stats = PartitionStats(digest="", partitions=[], label_counts={}, skipped={})
    assignment = Assignment(parse_settings(tree), "run", "g2", base.labels, "", plan.waves, base="base")
    prepared = Prepared(store, run, assignment, stats, "0", ModelSize(WIDTH, 0), plan, base)
    published = finish(prepared, ProgressLine(), seconds=1.0)
    assert published.generation == "g2" and not published.active and store.current() == "meanwhile"
    assert "g2 is published but doesn't serve, because meanwhile took over from its base base" in capsys.readouterr().err
    assert not store.objects.list("runs")


@pytest.mark.parametrize("root_key", [None, RootKeySource(key_env="CARRY_ROOT_KEY")], ids=["plain", "encrypted"])
def test_copying_a_wave_takes_the_memory_that_was_planned_for_it(
    root_key: RootKeySource | None, tiny_tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CARRY_ROOT_KEY", "9b" * 32)
    users, width = 2000, 2500
    store = AdapterStore(f"memory://{uuid.uuid4().hex}", encryption=root_key)
    writer = store.begin("base")
    writer.write_shared({"B": np.ones(2, np.float32)}, {})
    keys = as_rows(sorted(key_of(user) for user in range(users)))
    writer.write_segment(0, keys, np.random.default_rng(0).normal(size=(users, width)).astype(np.float32), np.ones(users, np.int32))
    writer.commit(expected_users=users, model=ModelRef(name="m", weight_hash="0"), adapter_config={})
    reader, again = store.open_generation(), store.begin("next")
    again.copy_shared(store.objects.read(names.shared("base")))
    nothing = np.zeros(users, np.int32)
    plan = PartitionPlan(
        keys, np.full(users, Action.CARRY, np.uint8), nothing, np.zeros((users, 16), np.uint8), np.empty((0, 0), np.float32), nothing[:0]
    )
    wave, whole = Wave(0, 0, 0, users), WaveUsers({0: plan}, reader, again)
    tracemalloc.start()
    nobody = SegmentUsers(keys[:0], np.empty((0, width), np.float32), nothing[:0])
    whole.write(wave, nobody, whole.unchanged(wave, set()), lambda segment: None)
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    planned = wave_bytes(parse_settings(tiny_tree), 2, width)(0, 0, users)
    assert taken <= planned * 1.25 and planned <= 2 * taken
