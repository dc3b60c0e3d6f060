"""The protocols end to end, on a store whose users' true vectors are known."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from plora_ray.data.splits import SplitTimes
from plora_ray.errors import ConfigError, DataError, StoreError
from plora_ray.evaluation import protocols
from plora_ray.evaluation.protocols import BASELINES, evaluate_store
from plora_ray.inference import InferenceEngine, load_generation

if TYPE_CHECKING:
    from tests.evaluation.conftest import World

ALL = list(BASELINES)


@pytest.fixture(scope="module")
def report(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return evaluate_store(world.settings, "all", ALL, tmp_path_factory.mktemp("report"))


def rows_of(world: World, cohort: str, split: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in world.data.read_text().splitlines()]
    return [row for row in rows if row["cohort"] == cohort and row["split"] == split]


def test_full_shot_measures_the_users_of_the_generation_with_and_without_their_adapters(world: World, report: dict[str, Any]) -> None:
    full = report["protocols"]["full"]
    assert (full["users"], full["rows"]) == (world.users_per_cohort, world.users_per_cohort * world.test_rows)
    assert full["predictors"]["with_user"]["accuracy"] == 1.0  # labels are the answers of exactly these adapters
    assert full["gain_over"]["population"]["accuracy"]["low"] > 0
    assert full["gain_over"]["label-prior"]["nll"]["low"] > 0


def test_the_figures_are_those_of_the_engine_that_serves(world: World, report: dict[str, Any]) -> None:
    rows = rows_of(world, "a", "test") + rows_of(world, "b", "test")
    loaded = load_generation(world.store)
    served = [world.store.pull(loaded.reader, world.store.key(row["user_id"])) for row in rows]
    engine = InferenceEngine(loaded)
    try:
        vectors = [None if adapter is None else torch.from_numpy(np.array(adapter.record)) for adapter in served]
        answers = loaded.labels.decode(engine.score(engine.encode([row["text"] for row in rows]), vectors))
    finally:
        engine.close()
    nll = [-np.log(answer.scores[row["label"]]) for answer, row in zip(answers, rows, strict=True)]
    half = len(rows) // 2
    assert report["protocols"]["full"]["predictors"]["with_user"]["nll"] == pytest.approx(np.mean(nll[:half]), abs=2e-5)
    assert report["protocols"]["zero"]["predictors"]["population"]["nll"] == pytest.approx(np.mean(nll[half:]), abs=2e-5)


def test_zero_shot_gives_users_outside_the_generation_the_populations_answer(world: World, report: dict[str, Any]) -> None:
    zero = report["protocols"]["zero"]
    assert zero["subject"] == "population" and "with_user" not in zero["predictors"]
    assert (zero["users"], zero["rows"]) == (world.users_per_cohort, world.users_per_cohort * world.test_rows)
    assert zero["predictors"]["label-prior"] == zero["predictors"]["majority"]  # without examples nothing is known of the user


def test_a_few_examples_of_informative_users_beat_the_population_and_more_help_more(world: World, report: dict[str, Any]) -> None:
    points = report["protocols"]["few"]["points"]
    assert [point["examples"] for point in points] == [count for count in protocols.SHOTS if count <= world.train_rows]
    assert report["protocols"]["few"]["note"] == "No user outside the generation has training rows for 16 examples"
    assert all(point["users"] == world.users_per_cohort for point in points)
    assert points[-1]["gain_over"]["population"]["nll"]["low"] > 0
    assert points[-1]["gain_over"]["population"]["accuracy"]["low"] > 0
    nll = [point["predictors"]["with_user"]["nll"] for point in points]
    assert nll[-1] < nll[0] < points[0]["predictors"]["population"]["nll"]


def test_by_time_the_future_is_compared_as_a_whole_and_part_by_part_and_a_taste_that_changes_shows(world: World, tmp_path: Path) -> None:
    """Rows of the past train; test rows come in hourly, and in the second half of the test's time everybody says the contrary."""
    start, rows = datetime(2024, 1, 1, tzinfo=UTC), []
    for place, row in enumerate(rows_of(world, "a", "train") + (test := rows_of(world, "a", "test"))):
        hours = place - world.users_per_cohort * world.train_rows
        changed = hours >= len(test) / 2
        label = {"no": "yes", "yes": "no"}[row["label"]] if changed else row["label"]
        rows.append({**row, "label": label, "timestamp": (start + timedelta(hours=hours)).isoformat()})
    data = tmp_path / "dated.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    dated = world.with_data(source=str(data), split_times=SplitTimes(test=start))
    report = evaluate_store(dated, "all", ALL, tmp_path / "out")
    full, time = report["protocols"]["full"], report["protocols"]["time"]
    assert time["predictors"] == full["predictors"] and time["gain_over"] == full["gain_over"]
    parts = [time["periods"][name] for name in sorted(time["periods"])]
    assert [part["rows"] for part in parts] == [len(test) // 4] * 4 and list(time["periods"])[0].startswith("1 of 4: 2024-01-01 to ")
    assert [part["predictors"]["with_user"]["accuracy"] for part in parts] == [1.0, 1.0, 0.0, 0.0]
    assert "soon after training" in time["note"] and "gain_over_time.png" in report["plots"]
    assert "By age of the rows" in (tmp_path / "out" / "report.html").read_text()
    with pytest.raises(ConfigError, match="protocol time needs data.split_times"):
        evaluate_store(world.settings, "time", [], tmp_path / "none")


def test_a_regression_is_measured_in_the_labels_units(regression_world: World, tmp_path: Path) -> None:
    report = evaluate_store(regression_world.settings, "all", ALL, tmp_path)
    labels = [row["label"] for row in rows_of(regression_world, "a", "train")]
    errors = [(row["label"] - np.mean(labels)) ** 2 for row in rows_of(regression_world, "a", "test")]
    full = report["protocols"]["full"]["predictors"]
    assert full["majority"]["mse"] == pytest.approx(np.mean(errors), rel=1e-4)
    assert full["with_user"]["mse"] < 1e-6 < full["population"]["mse"]
    assert report["protocols"]["few"]["points"][-1]["gain_over"]["population"]["mse"]["low"] > 0


def test_a_filter_chooses_the_cohort_and_a_protocol_without_rows_is_reported_as_skipped(world: World, tmp_path: Path) -> None:
    report = evaluate_store(world.with_data(filter={"cohort": "b"}), "all", ALL, tmp_path)
    assert report["protocols"]["full"]["status"] == "skipped" and "no test rows" in report["protocols"]["full"]["reason"]
    assert report["protocols"]["few"]["status"] == report["protocols"]["zero"]["status"] == "evaluated"
    assert report["data"]["users_in_generation"] == 0


def test_nothing_to_evaluate_is_an_error_that_says_why(world: World, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing to evaluate: full: the data has no test rows of users in the generation"):
        evaluate_store(world.with_data(filter={"cohort": "b"}), "full", ALL, tmp_path)
    with pytest.raises(DataError, match="zero"):
        evaluate_store(world.with_data(filter={"cohort": "a"}), "zero", ALL, tmp_path)


@pytest.mark.parametrize(("protocol", "baselines"), [("half", []), ("full", ["majority", "oracle"])])
def test_unknown_names_are_errors_that_name_the_valid_ones(world: World, tmp_path: Path, protocol: str, baselines: list[str]) -> None:
    with pytest.raises(ConfigError, match="full, few, zero, time, all" if protocol == "half" else "majority, label-prior, population"):
        evaluate_store(world.settings, protocol, baselines, tmp_path)


def test_a_task_that_isnt_the_generations_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trained for classification"):
        evaluate_store(world.settings.model_copy(update={"task": "regression"}), "full", ALL, tmp_path)


def test_a_store_without_a_generation_is_refused(world: World, tmp_path: Path) -> None:
    empty = world.settings.model_copy(update={"store": world.settings.store.model_copy(update={"uri": str(tmp_path / "none")})})
    with pytest.raises(StoreError):
        evaluate_store(empty, "full", ALL, tmp_path / "out")


def test_only_the_baselines_asked_for_are_reported_and_always_the_population(world: World, tmp_path: Path) -> None:
    report = evaluate_store(world.settings, "full", ["majority"], tmp_path)
    assert set(report["protocols"]) == {"full"}
    assert set(report["protocols"]["full"]["predictors"]) == {"with_user", "population", "majority"}


def test_without_training_rows_there_are_no_label_baselines(world: World, tmp_path: Path) -> None:
    data = tmp_path / "tests.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows_of(world, "b", "test")))
    report = evaluate_store(world.with_data(source=str(data)), "all", ALL, tmp_path / "out")
    assert set(report["protocols"]["zero"]["predictors"]) == {"population"}
    assert report["protocols"]["few"]["reason"] == "the users outside the generation who have test rows have no training rows"


def test_the_examples_of_a_user_do_not_depend_on_the_order_of_the_rows(world: World, report: dict[str, Any], tmp_path: Path) -> None:
    data = tmp_path / "reversed.jsonl"
    data.write_text("\n".join(reversed(world.data.read_text().splitlines())) + "\n")
    again = evaluate_store(world.with_data(source=str(data)), "few", ALL, tmp_path / "out")
    for point, other in zip(report["protocols"]["few"]["points"], again["protocols"]["few"]["points"], strict=True):
        assert point["predictors"]["with_user"]["nll"] == pytest.approx(other["predictors"]["with_user"]["nll"], abs=2e-5)


def test_a_text_goes_through_the_model_once_for_the_population(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scored = 0
    original = InferenceEngine.score

    def counting(self: InferenceEngine, ids: Any, vectors: Any) -> Any:
        nonlocal scored
        scored += len(ids)
        return original(self, ids, vectors)

    monkeypatch.setattr(InferenceEngine, "score", counting)
    monkeypatch.setattr(protocols, "generation_costs", lambda engine, rows: {})  # asks for texts one at a time, to time them
    report = evaluate_store(world.settings, "zero", ALL, tmp_path)
    assert scored <= report["data"]["different_test_texts"] < report["protocols"]["zero"]["rows"]


def test_the_report_counts_test_rows_whose_text_was_learnt(world: World, tmp_path: Path) -> None:
    def words(text: str) -> list[str]:
        return "".join(letter if letter.isalnum() else " " for letter in text.casefold()).split()

    rows = [json.loads(line) for line in world.data.read_text().splitlines()]
    shouted = [{**row, "text": row["text"].upper().replace(" ", ", ") + "!"} if row["split"] == "test" else row for row in rows]
    learnt = [words(row["text"]) for row in rows if row["split"] == "train"]
    expected = sum(words(row["text"]) in learnt for row in shouted if row["split"] == "test")
    (tmp_path / "shouted.jsonl").write_text("".join(json.dumps(row) + "\n" for row in shouted))
    report = evaluate_store(world.with_data(source=str(tmp_path / "shouted.jsonl")), "full", [], tmp_path / "out")
    assert report["data"]["test_rows_with_a_training_text"] == expected > 0


def test_bad_rows_stop_an_evaluation_as_they_stop_training_unless_they_are_skipped(world: World, tmp_path: Path) -> None:
    data = tmp_path / "bad.jsonl"
    blank = {"user_id": "a-person-0", "text": " ", "label": "yes", "split": "test", "cohort": "a"}
    data.write_text(world.data.read_text() + json.dumps(blank))
    with pytest.raises(DataError, match=r"bad\.jsonl:\d+: text is blank"):
        evaluate_store(world.with_data(source=str(data)), "full", ALL, tmp_path / "out")
    report = evaluate_store(world.with_data(source=str(data), on_bad_row="skip"), "full", ALL, tmp_path / "out")
    assert report["data"]["bad_rows_skipped"] == 1


def test_erased_users_are_left_out(build_world: Any, tmp_path: Path) -> None:
    world: World = build_world("classification")
    world.store.erase(world.store.key("a-person-0"))
    world.store.erase(world.store.key("b-person-0"))
    report = evaluate_store(world.settings, "all", ALL, tmp_path)
    assert report["data"]["users_erased_and_left_out"] == 2
    assert report["protocols"]["full"]["users"] == report["protocols"]["zero"]["users"] == world.users_per_cohort - 1
