"""Runs and their plans in the store: what two jobs at once, a stopped one and garbage collection may do to each other."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from plora_ray.config import parse_settings
from plora_ray.data.trained_users import TrainedUsers
from plora_ray.errors import StoreError
from plora_ray.store import AdapterStore, ModelRef, UserAdapter, collection, names, new_version
from plora_ray.store.folding import FreshSnapshot
from plora_ray.training.plan import PartitionPlan, Plan, PlanBuilder
from plora_ray.training.prepare import Prepared, prepare
from plora_ray.training.progress import ProgressLine
from plora_ray.training.run_state import RunState
from plora_ray.training.runs import ALIVE_S, Heartbeat, delete_abandoned_runs, end_runs_of
from plora_ray.training.waves import WaveLimits
from tests.generations import LABELS, publish

MODEL = ModelRef(name="m", weight_hash="0")


@pytest.fixture
def store() -> AdapterStore:
    return AdapterStore(f"memory://{uuid.uuid4().hex}")


def draft(run: RunState, users: int) -> Plan:
    keys = np.zeros((users, 16), np.uint8)
    keys[:, 15] = np.arange(users)
    partition = PartitionPlan.fit_all(TrainedUsers(keys, keys, np.full(users, 3, np.int32)))
    builder = PlanBuilder(WaveLimits(100, 2**30, lambda users, rows, copied: 1))
    builder.add(0, partition)
    run.plan.save_partition(0, partition)
    return builder.build()


def test_of_two_jobs_that_plan_one_run_at_once_both_follow_the_first_whole_plan(store: AdapterStore) -> None:
    first, second = RunState(store.objects, "run"), RunState(store.objects, "run")
    plan, other = draft(first, 3), draft(second, 2)
    assert first.plan.load() is None
    with pytest.raises(StoreError, match="no whole plan"):
        first.plan.load_partition(0)
    assert second.plan.save(other, np.array([7], np.uint64)) == other
    assert first.plan.save(plan, np.array([8], np.uint64)) == other
    for run in (first, second, RunState(store.objects, "run")):
        assert run.plan.load() == other and len(run.plan.load_partition(0).keys) == 2 and run.plan.fresh_seen().tolist() == [7]


def test_a_run_at_work_is_never_collected_nor_the_generations_that_it_makes_and_starts_from(
    store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("base", "older", "serving"):
        writer = store.begin(name)
        writer.write_shared({"B": np.ones(2, np.float32)}, {})
        writer.commit(expected_users=0, model=MODEL, adapter_config={})
    run, given_up = RunState(store.objects, "at-work"), RunState(store.objects, "given-up")
    head, resumed = run.begin("base")
    assert not resumed and run.begin("serving") == (head, True), "the first start fixes what a run makes and starts from"
    store.begin(head.generation)
    given_up.begin()
    store.objects.write("runs/left-over/waves/00000.safetensors", b"written by a worker after its run's folder was deleted")
    later = time.time() + 2 * ALIVE_S
    monkeypatch.setattr(time, "time", lambda: later)
    run.beat()
    left = delete_abandoned_runs(store.objects, grace_s=0)
    assert left.deleted == ["given-up", "left-over"] and left.needed == {head.generation, "base"}
    collected = collection.collect(store, keep=1, grace_s=0, needed=left.needed)
    assert [item.generation for item in collected] == ["older"] and run.head() is not None


def test_a_heartbeat_goes_on_while_the_work_does_and_never_revives_a_run_that_is_over(store: AdapterStore) -> None:
    run = RunState(store.objects, "run")
    begun = run.begin()[0]
    with Heartbeat(run, every_s=0.01):
        deadline = time.monotonic() + 30
        while (head := run.head()) is None or head.seen_at <= begun.seen_at:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        run.delete()
    run.beat()
    assert run.head() is None and store.objects.list("runs") == []


def test_what_a_stopped_run_left_undone_after_publishing_is_done_before_its_folder_goes(store: AdapterStore) -> None:
    writer = store.begin("g1")
    basis = writer.write_shared({"B": np.ones(2, np.float32)}, {}).sha256
    run = RunState(store.objects, "run")
    store.objects.update("runs/run/run.json", lambda data: run.begin()[0].dump().replace(run.begin()[0].generation.encode(), b"g1"))
    run.plan.save(draft(run, 2), np.empty(0, np.uint64))
    behind = "00000000000000000001-00000000"  # stored during the run by a machine whose clock is behind
    key = store.key("ann")
    store.put_fresh(UserAdapter(key, np.ones(3, np.float32), 4, "g1", behind, "now", "fresh", basis))
    manifest = writer.commit(expected_users=0, model=MODEL, adapter_config={})
    end_runs_of(store.objects, manifest)
    found = store.get_fresh(key)
    assert found is not None and found.version > manifest.version and store.objects.list("runs") == []


@pytest.fixture
def retraining(tiny_tree: dict[str, Any], tiny_plm: str, tmp_path: Path) -> Iterator[Callable[..., Prepared]]:
    """Prepares a run over three users' rows that starts from the generation g1."""
    store = AdapterStore(str(tmp_path / "store"))
    publish(store, tiny_plm, "g1", ["ann"])
    lines = [f"{user},text {place},{label},train" for user in ("ann", "bob", "cy") for place, label in enumerate(LABELS.classes)]
    (tmp_path / "rows.csv").write_text("\n".join(["user_id,text,label,split", *lines]))

    def prepared(**training: Any) -> Prepared:
        tree = {**tiny_tree, "data": {"source": str(tmp_path / "rows.csv")}, "training": {**tiny_tree["training"], **training}}
        with ProgressLine() as line:
            return prepare(parse_settings(tree), line)

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield prepared
    ray.shutdown()


def test_a_generation_begins_before_its_plan_looks_at_fresh_adapters(
    retraining: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []
    take = FreshSnapshot.take
    monkeypatch.setattr(FreshSnapshot, "take", lambda objects: (taken.append(new_version()), take(objects))[1])
    prepared = retraining(only_users_with_new_data=True)
    begun = prepared.store.resume(prepared.assignment.generation).version
    assert len(taken) == 1 and begun < taken[0], "a fresh adapter stored between the two would be neither folded in nor newer"


def test_a_warm_start_goes_on_from_the_generation_that_it_began_with_though_another_one_serves_by_now(
    retraining: Callable[..., Prepared], tiny_plm: str
) -> None:
    first = retraining(warm_start=True)
    publish(first.store, tiny_plm, "g2", ["ann", "bob"])
    assert first.store.current() == "g2"
    again = retraining(warm_start=True)
    assert (again.assignment.base, again.assignment.generation) == ("g1", first.assignment.generation)
    assert again.base is not None and again.base.reader.generation == "g1"


def test_a_generation_that_nobody_will_publish_leaves_nothing_and_a_published_one_is_not_taken_for_one(store: AdapterStore) -> None:
    writer = store.begin("g1")
    writer.write_shared({"B": np.ones(2, np.float32)}, {})
    collection.abandon(store, "g1")
    assert store.objects.list(names.GENERATIONS) == []
    writer = store.begin("g1")
    writer.write_shared({"B": np.ones(2, np.float32)}, {})
    writer.commit(expected_users=0, model=MODEL, adapter_config={})
    with pytest.raises(StoreError, match="g1 is published"):
        collection.abandon(store, "g1")
