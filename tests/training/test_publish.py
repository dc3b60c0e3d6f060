"""What is published holds every planned user, or nothing is published."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from plora_ray.adapters.fit import UserPrior
from plora_ray.adapters.forgetting import Forgetting
from plora_ray.adapters.labels import LabelSpace
from plora_ray.config import parse_settings
from plora_ray.data.stats import PartitionCounts, PartitionStats
from plora_ray.data.trained_users import TrainedUsers
from plora_ray.errors import StoreError
from plora_ray.store import AdapterStore, ModelRef
from plora_ray.store.uses import read_uses, today
from plora_ray.training.memory import ModelSize
from plora_ray.training.plan import PartitionPlan, Plan, PlanBuilder
from plora_ray.training.prepare import Prepared
from plora_ray.training.progress import ProgressLine
from plora_ray.training.publish import publish, stored_report
from plora_ray.training.rank import Assignment
from plora_ray.training.report import TrainingReport, add_up
from plora_ray.training.run_state import RunState, WaveOutcome
from plora_ray.training.telemetry.history import History
from plora_ray.training.waves import WaveLimits

USERS, PER_WAVE, DIM = 6, 2, 8
LABELS = LabelSpace("classification", ("no", "yes"))
PRIOR = UserPrior(torch.zeros(DIM), torch.eye(DIM))


def outcome(users: int) -> WaveOutcome:
    nothing = np.zeros((0, 2), np.float32)
    return WaveOutcome(
        examples=np.full(users, 3, np.int32), row_users=np.zeros(0, np.int64), labels=np.zeros(0, np.int64), population=nothing,
        personal=nothing, label_counts=np.ones((users, 2), np.float32), remaining=np.full(users, np.nan, np.float32),
        guarded=np.zeros(users, bool),
        copied=np.zeros(0, np.int32),
    )  # fmt: skip


@dataclass
class Job:
    """A run whose three waves of two users each were planned; the tests write waves as workers would."""

    store: AdapterStore
    run: RunState
    assignment: Assignment
    plan: Plan
    keys: np.ndarray

    @classmethod
    def begin(cls, folder: Path, tree: dict[str, Any]) -> Job:
        store = AdapterStore(str(folder / "store"))
        run = RunState(store.objects, "0" * 32)
        generation = run.begin()[0].generation
        keys = np.frombuffer(b"".join(sorted(store.key(f"u{number}") for number in range(USERS))), np.uint8).reshape(-1, 16)
        partition = PartitionPlan.fit_all(TrainedUsers(keys, np.ones((USERS, 16), np.uint8), np.full(USERS, 3, np.int32)))
        builder = PlanBuilder(WaveLimits(PER_WAVE, 2**30, lambda users, rows, copied: 1))
        builder.add(0, partition)
        run.plan.save_partition(0, partition)
        plan = run.plan.save(builder.build(), np.empty(0, np.uint64))
        store.begin(generation).write_shared({"B": np.ones((2, 2), np.float32)}, {})
        return cls(store, run, Assignment(parse_settings(tree), "0" * 32, generation, LABELS, "unused", plan.waves), plan, keys)

    def write(self, wave: int, users: int, value: float = 1.0, *, segment: bool = True) -> None:
        """A worker's wave with its first `users` users; without `segment`, it is stopped just before it writes that."""
        keys = self.keys[self.plan.waves[wave].start :][:users]

        def announce(sha256: str | None) -> None:
            self.run.save_wave(wave, outcome(users), sha256)
            if not segment:
                raise InterruptedError

        if not users:
            announce(None)
            return
        records, examples = np.full((users, DIM), value, np.float32), np.full(users, 3, np.int32)
        with contextlib.suppress(InterruptedError):
            self.store.resume(self.assignment.generation).write_segment(wave, keys, records, examples, announce)

    def end(self, prior: UserPrior | None = None) -> int:
        """What the driver does once all workers say that they are done; returns how many users it published."""
        counts = PartitionCounts(users=USERS, train_users=USERS, rows={"train": 18, "validation": 0, "test": 0}, tokens=18)
        stats = PartitionStats(
            digest="", partitions=[counts], label_counts={"train": {"no": 9, "yes": 9}, "validation": {}, "test": {}}, skipped={}
        )
        segments = self.store.resume(self.assignment.generation).finished_waves()
        totals = add_up(self.assignment, self.run, stats, segments, self.store.tombstones().keys())
        history = History(self.store.objects, self.run.folder)
        report = TrainingReport(self.assignment, self.plan, stats, totals, history, 1.0, prior=prior)
        prepared = Prepared(self.store, self.run, self.assignment, stats, "weights", ModelSize(DIM, 0), self.plan, None)
        return publish(prepared, report, segments, ProgressLine(), seconds=1.0).users


@pytest.fixture
def job(tmp_path: Path, tiny_tree: dict[str, Any]) -> Job:
    return Job.begin(tmp_path, tiny_tree)


@pytest.mark.parametrize(
    ("second_wave", "message"),
    [
        (None, "1 of 3 waves are not trained .the first is 1.: run the job again"),
        ({"users": 2, "segment": False}, "1 of 3 waves are not trained .the first is 1."),
        ({"users": 1}, "wave 1 holds 1 users, but 2 were planned and 0 erased"),
        ({"users": 0}, "wave 1 holds 0 users, but 2 were planned and 0 erased"),
    ],
)
def test_a_generation_with_a_missing_wave_or_fewer_users_than_planned_is_not_published(
    job: Job, second_wave: dict[str, Any] | None, message: str
) -> None:
    job.write(0, 2)
    job.write(2, 2)
    if second_wave is not None:
        job.write(1, **second_wave)
    with pytest.raises(StoreError, match=message):
        job.end()
    assert job.store.current() is None and job.store.generations() == []


def test_a_generation_with_every_planned_user_is_published_with_its_report(job: Job) -> None:
    for wave in range(3):
        job.write(wave, 2)
    assert job.end() == job.store.open_generation().users == USERS
    values, files = stored_report(job.store, job.assignment.generation)  # what a start that only finishes hands to telemetry
    assert values["generation"] == job.assignment.generation and set(files) == {"report.json", "report.html"}


@pytest.mark.parametrize(
    ("prior", "told"),
    [
        (None, (None, None)),
        (replace(PRIOR, lasting=0.75), (0.75, None)),
        (replace(PRIOR, forgetting=Forgetting(1206.98, 16_000.0, 0.9)), (1.0, {"half_life_days": 1210.0, "lasting": 0.9})),
        (replace(PRIOR, forgetting=Forgetting(1 / 24, 16_000.0)), (1.0, {"half_life_days": 0.0417, "lasting": 1.0})),
    ],
)
def test_the_report_says_what_lasts_and_how_fast_rows_are_forgotten(
    job: Job, prior: UserPrior | None, told: tuple[float | None, dict[str, float] | None]
) -> None:
    for wave in range(3):
        job.write(wave, 2)
    job.end(prior)
    values, files = stored_report(job.store, job.assignment.generation)
    assert (values["lasting"], values["forgetting"]) == told
    page = files["report.html"].decode()
    assert ("kept of what is found of a user" in page) == (prior is not None)
    assert ("days after which a row counts half" in page) == (told[1] is not None) == ("1,210" in page or "0.0417" in page)


def test_what_is_published_without_activation_leaves_the_current_generation_serving_and_may_be_tried_on_a_share(
    tmp_path: Path, tiny_tree: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    job = Job.begin(tmp_path, {**tiny_tree, "training": {**tiny_tree["training"], "activate": False}})
    writer = job.store.begin("before")
    writer.write_shared({"B": np.ones((2, 2), np.float32)}, {})
    writer.commit(expected_users=0, model=ModelRef(name="m", weight_hash="0"), adapter_config={})
    for wave in range(3):
        job.write(wave, 2)
    assert job.end() == USERS and job.store.current() == "before"
    assert f"{job.assignment.generation} is published and doesn't serve" in capsys.readouterr().err
    job.store.set_canary(job.assignment.generation, 0.1)
    assert job.store.canary() is not None


def test_with_retention_on_the_users_who_were_fitted_count_as_used(tmp_path: Path, tiny_tree: dict[str, Any]) -> None:
    job = Job.begin(tmp_path, {**tiny_tree, "store": {**tiny_tree["store"], "retention": {"unused_adapters_days": 30}}})
    for wave in range(3):
        job.write(wave, 2)
    job.end()
    assert read_uses(job.store.objects, today()).tolist() == job.keys.tolist()


@pytest.mark.parametrize("erased_place", [1, 5])
def test_only_the_erased_users_of_a_wave_itself_may_be_missing_from_it(job: Job, erased_place: int) -> None:
    job.store.erase(job.keys[erased_place].tobytes())
    job.write(0, 1)
    job.write(1, 2)
    job.write(2, 2)
    if erased_place == 1:
        assert job.end() == USERS - 1
    else:
        with pytest.raises(StoreError, match="wave 0 holds 1 users, but 2 were planned and 0 erased"):
            job.end()


@pytest.mark.parametrize("late", ["a worker given up for dead", "its successor"])
def test_of_two_workers_that_fit_one_wave_the_first_segment_counts_with_its_own_outcome(job: Job, late: str) -> None:
    job.store.erase(job.keys[1].tobytes())  # before the one and after the other has looked for erasures
    attempts = [(2, 1.0), (1, 2.0)]
    for users, value in attempts if late == "its successor" else reversed(attempts):
        job.write(0, users, value)
    job.write(1, 2)
    job.write(2, 2)
    published = job.end()
    assert published == (USERS if late == "its successor" else USERS - 1) == job.store.generations()[0].users
