"""Which rows an evaluation uses: nobody knows more than he should, and nothing that was learnt is asked."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from plora_ray.config import EvaluationSettings, Settings
from plora_ray.data.splits import SplitTimes
from plora_ray.errors import ConfigError, DataError
from plora_ray.evaluation.protocols import evaluate_store
from plora_ray.evaluation.rows import EvaluationRows, read_rows
from plora_ray.inference import load_generation

if TYPE_CHECKING:
    from tests.evaluation.conftest import World


def read(world: World, settings: Settings, kept: int = 4) -> EvaluationRows:
    loaded = load_generation(world.store)
    return read_rows(settings.data, world.store, loaded.reader, loaded.labels, examples_kept=kept, on_unit=lambda done, units: None)


def test_new_users_who_share_their_texts_have_examples_of_their_own(world: World, tmp_path: Path) -> None:
    texts = [f"word{number}" for number in range(20)]
    rows = [{"user_id": f"new-{user}", "text": text, "label": "yes", "split": "train"} for user in range(30) for text in texts]
    found = read(world, world.with_rows(rows, tmp_path / "shared.jsonl"))
    drawn = {tuple(text for text, _ in examples) for examples in found.examples.values()}
    assert len(found.examples) == 30 and all(len(set(examples)) == 4 for examples in drawn)
    assert len(drawn) > 25, "a draw for all would be the same few texts for everybody"


def test_the_order_of_the_source_draws_nothing(world: World, tmp_path: Path) -> None:
    found = []
    for name, rows in (("a", world.rows()), ("b", world.rows()[::-1])):
        part = read(world, world.with_rows(rows, tmp_path / f"{name}.jsonl"))
        found.append({part.keys[user]: examples for user, examples in part.examples.items()})
    assert found[0] == found[1]


def test_what_reads_no_text_knows_of_new_users_the_examples_and_nothing_else(world: World, tmp_path: Path) -> None:
    """Labels of new users' other training rows change nothing that any predictor says."""
    seen = read(world, world.settings, kept=1).examples
    known = {text for examples in seen.values() for text, _ in examples}

    def unseen(row: dict[str, Any]) -> bool:
        return row["cohort"] == "b" and row["split"] == "train" and row["text"] not in known

    changed = [{**row, "label": "yes"} if unseen(row) else row for row in world.rows()]
    assert changed != world.rows()
    before, after = (
        evaluate_store(settings, "all", ["majority", "label-prior"], tmp_path / name, shots=(1,))["protocols"]
        for name, settings in (("before", world.settings), ("after", world.with_rows(changed, tmp_path / "changed.jsonl")))
    )
    for protocol in ("few", "zero"):
        assert after[protocol] == before[protocol]


def test_everybody_is_all_users_where_the_data_has_no_one_of_the_generation(world: World) -> None:
    newcomers = world.with_data(filter={"cohort": "b"})
    labels = [row["label"] for row in world.rows() if row["cohort"] == "b" and row["split"] == "train"]
    expected = [(labels.count(name) + 1) / (len(labels) + 2) for name in ("no", "yes")]
    assert read(world, newcomers).history.overall.tolist() == pytest.approx(expected)


def test_the_digest_tells_other_users_rows_or_examples_but_neither_names_nor_order(world: World, tmp_path: Path) -> None:
    rows = world.rows()
    newcomers = [row for row in rows if row["cohort"] == "b"]

    def digest(name: str, changed: list[dict[str, Any]]) -> str:
        return read(world, world.with_rows(changed, tmp_path / f"{name}.jsonl"), kept=world.train_rows).digest  # none is drawn

    plain = digest("plain", rows)
    renamed = [{**row, "user_id": f"somebody else {row['user_id']}"} if row["cohort"] == "b" else row for row in rows]
    assert digest("reversed", rows[::-1]) == plain
    assert digest("of newcomers", newcomers) == digest("renamed", [row for row in renamed if row["cohort"] == "b"]) != plain
    tests = [place for place, row in enumerate(rows) if row["split"] == "test"]
    swapped, others = list(rows), [rows[place]["user_id"] for place in tests[1:] + tests[:1]]
    for place, other in zip(tests, others, strict=True):
        swapped[place] = {**rows[place], "user_id": other}
    relabelled = [{**row, "label": "yes"} if row["cohort"] == "b" and row["split"] == "train" else row for row in rows]
    unknown = [{**row, "user_id": f"nobody {row['user_id']}"} if row["cohort"] == "a" else row for row in rows]
    assert len({plain, digest("swapped", swapped), digest("other examples", relabelled), digest("nobody known", unknown)}) == 4


def test_a_row_with_a_label_the_generation_never_saw_is_a_bad_row(world: World, tmp_path: Path) -> None:
    rows = [*world.rows(), {"user_id": "b-person-0", "text": "word1", "label": "maybe", "split": "train", "cohort": "b"}]
    settings = world.with_rows(rows, tmp_path / "maybe.jsonl")
    with pytest.raises(DataError, match=rf"maybe\.jsonl:{len(rows)}: label 'maybe' is not one of this model's: no, yes"):
        evaluate_store(settings, "full", [], tmp_path / "out")
    settings = world.with_rows(rows, tmp_path / "maybe.jsonl", on_bad_row="skip")
    assert evaluate_store(settings, "full", [], tmp_path / "out")["data"]["bad_rows_skipped"] == 1


def test_test_rows_with_a_text_of_training_or_validation_rows_are_counted_and_can_be_left_out(world: World, tmp_path: Path) -> None:
    person = {"user_id": "a-person-0", "label": "yes"}
    texts = {"word1 word2": "train", "word3 word4": "validation", "Word3, word4!": "test", "word1  word2": "test", "word5": "test"}
    rows = [{**person, "text": text, "split": split} for text, split in texts.items()]
    settings = world.with_rows(rows, tmp_path / "rows.jsonl")
    assert read(world, settings).learnt_texts == 2
    fewer = settings.model_copy(update={"evaluation": EvaluationSettings(leave_out_learnt_texts=True)})
    report, without = (evaluate_store(chosen, "full", [], tmp_path / "out")["data"] for chosen in (settings, fewer))
    assert (report["test_rows"], without["test_rows"], without["test_rows_with_a_training_text"]) == (3, 1, 2)
    assert report["test_rows_digest"] != without["test_rows_digest"] and without["different_test_texts"] == 1


TRAINED = {"split_seed": 3, "validation_fraction": 0.1, "test_fraction": 0.2}
PAST = SplitTimes(validation=datetime(2020, 1, 1, tzinfo=UTC), test=datetime(2021, 1, 1, tzinfo=UTC))
EARLIER, LATER = (SplitTimes(test=datetime(year, 1, 1, tzinfo=UTC)) for year in (2020, 2022))


@pytest.mark.parametrize(
    ("trained", "by_column", "given", "told"),
    [
        (TRAINED, False, TRAINED, None),
        (TRAINED, False, {**TRAINED, "validation_fraction": 0.3, "test_fraction": 0.1}, None),
        (TRAINED, False, {**TRAINED, "split_seed": 4}, r"data\.split_seed is 4: set it to 3"),
        (TRAINED, False, {**TRAINED, "test_fraction": 0.3}, r"data\.test_fraction is 0\.3: set it to 0\.2 or less"),
        (TRAINED, False, {"split_times": PAST}, r"its rows were divided by their texts: leave data\.split_times out"),
        ({"split_times": PAST}, False, {}, r"its rows were divided by time: set data\.split_times\.test to 2021-01-01"),
        ({"split_times": PAST}, True, {"split_times": EARLIER}, r"split_times\.test is 2020-01-01.*: set it to 2021-01-01.* or later"),
        ({"split_times": PAST}, True, {"split_times": LATER}, None),
        ({}, True, {}, r"it was trained by a split column .*: give them that column"),
        ({}, True, {"split_times": PAST}, r"it was trained by a split column"),
    ],
)
def test_rows_divided_otherwise_than_in_training_are_refused(
    build_world: Any, tmp_path: Path, trained: dict[str, Any], by_column: bool, given: dict[str, Any], told: str | None
) -> None:
    world: World = build_world("classification")
    report = {"settings": world.with_data(**trained).published(), "split_column": by_column}
    world.store.objects.write("generations/g1/report.json", json.dumps(report).encode())
    rows = [{key: value for key, value in row.items() if key != "split"} for row in world.rows()]
    for place, row in enumerate(rows):
        row["timestamp"] = f"20{18 + place % 6}-03-01"
    settings = world.with_rows(rows, tmp_path / "rows.jsonl", **given)
    if told is None:
        assert evaluate_store(settings, "full", [], tmp_path / "out")["protocols"]["full"]["rows"] > 0
        return
    with pytest.raises(ConfigError, match=told):
        evaluate_store(settings, "full", [], tmp_path / "out")


def test_a_split_column_needs_no_such_agreement_nor_does_a_report_that_doesnt_tell(build_world: Any, tmp_path: Path) -> None:
    world: World = build_world("classification")
    trained = world.with_data(**TRAINED)
    for report in ({"settings": trained.published(), "split_column": False}, {"settings": trained.published()}, {}):
        world.store.objects.write("generations/g1/report.json", json.dumps(report).encode())
        assert evaluate_store(world.settings, "full", [], tmp_path)["data"]["split_seed"] == 0


def test_the_label_prior_is_the_same_whoever_comes_first_in_the_data(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plora_ray.evaluation.baselines.MOST_USERS", world.users_per_cohort)
    last, first = world.rows(), sorted(world.rows(), key=lambda row: row["cohort"] == "a")
    strengths = [read(world, world.with_rows(rows, tmp_path / "rows.jsonl")).history.strength for rows in (last, first)]
    assert strengths[0] == strengths[1] < 1000


def test_users_of_a_regression_whose_labels_cancel_are_counted(regression_world: World, tmp_path: Path) -> None:
    rows = [{**row, "label": (-1.0) ** place} for place, row in enumerate(regression_world.rows())]
    costs = evaluate_store(regression_world.with_rows(rows, tmp_path / "rows.jsonl"), "zero", ["label-prior"], tmp_path / "out")
    assert costs["predictor_costs"]["label-prior"]["parameters_in_all"] == 1 + 2 * regression_world.users_per_cohort
