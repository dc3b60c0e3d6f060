"""What is published holds every planned user, or nothing is published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plora_ray.adapters.labels import LabelSpace
from plora_ray.config import parse_settings
from plora_ray.data.stats import PartitionCounts, PartitionStats
from plora_ray.data.trained_users import TrainedUsers
from plora_ray.errors import StoreError
from plora_ray.store import AdapterStore
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


def outcome(users: int) -> WaveOutcome:
    nothing = np.zeros((0, 2), np.float32)
    return WaveOutcome(
        examples=np.full(users, 3, np.int32), row_users=np.zeros(0, np.int64), labels=np.zeros(0, np.int64), population=nothing,
        personal=nothing, label_counts=np.ones((users, 2), np.float32), remaining=np.full(users, np.nan, np.float32),
        copied=np.zeros(0, np.int32),
    )  # fmt: skip


def plan_of(keys: np.ndarray) -> Plan:
    builder = PlanBuilder(WaveLimits(PER_WAVE, 2**30, lambda users, rows, copied: 1))
    builder.add(0, PartitionPlan.fit_all(TrainedUsers(keys, np.ones((len(keys), 16), np.uint8), np.full(len(keys), 3, np.int32))))
    return builder.build()


@pytest.mark.parametrize(
    ("outcomes", "segments", "message"),
    [
        ({0: 2, 2: 2}, {0: 2, 2: 2}, "1 of 3 waves are not trained .the first is 1.: run the job again"),
        ({0: 2, 1: 1, 2: 2}, {0: 2, 1: 1, 2: 2}, "the waves hold 5 users, but 6 were planned"),
        ({0: 2, 1: 2, 2: 2}, {0: 2, 2: 2}, "has 4 users in 2 finished waves, expected 6: run the job again"),
        ({0: 2, 1: 2, 2: 2}, {0: 2, 1: 1, 2: 2}, "has 5 users in 3 finished waves, expected 6"),
        ({0: 2, 1: 2, 2: 2}, {0: 2, 1: 2, 2: 2}, None),
    ],
)
def test_a_generation_with_a_missing_wave_or_fewer_users_than_planned_is_not_published(
    tmp_path: Path, tiny_tree: dict[str, Any], outcomes: dict[int, int], segments: dict[int, int], message: str | None
) -> None:
    store = AdapterStore(str(tmp_path / "store"))
    run = RunState(store.objects, "0" * 32)
    generation, _ = run.begin()
    keys = np.frombuffer(b"".join(sorted(store.key(f"u{number}") for number in range(USERS))), np.uint8).reshape(-1, 16)
    plan = plan_of(keys)
    waves = plan.waves
    writer = store.begin(generation)
    writer.write_shared({"B": np.ones((2, 2), np.float32)}, {})
    for wave in waves:
        if wave.index in outcomes:
            run.save_wave(wave.index, outcome(outcomes[wave.index]))
        if wave.index in segments:
            mine = keys[wave.start : wave.start + segments[wave.index]]
            writer.write_segment(wave.index, mine, np.ones((len(mine), DIM), np.float32), np.full(len(mine), 3, np.int32))
    counts = PartitionCounts(users=USERS, train_users=USERS, rows={"train": 18, "validation": 0, "test": 0}, tokens=18)
    stats = PartitionStats(
        digest="", partitions=[counts], label_counts={"train": {"no": 9, "yes": 9}, "validation": {}, "test": {}}, skipped={}
    )
    assignment = Assignment(parse_settings(tiny_tree), "0" * 32, generation, LABELS, "unused", waves)

    def end_of_the_run() -> int:
        totals = add_up(assignment, run, stats, erased=0)
        report = TrainingReport(assignment, plan, stats, totals, History(store.objects, run.folder), 1.0)
        prepared = Prepared(store, run, assignment, stats, "weights", ModelSize(DIM, 0), plan, None)
        return publish(prepared, report, ProgressLine(), seconds=1.0).users

    if message is None:
        assert end_of_the_run() == store.open_generation().users == USERS
        values, files = stored_report(store, generation)  # what a start that only finishes hands to telemetry
        assert values["generation"] == generation and set(files) == {"report.json", "report.html"}
        return
    with pytest.raises(StoreError, match=message):
        end_of_the_run()
    assert store.current() is None and store.generations() == []
