"""The report's files: complete, self-contained, about nobody in particular, and honest."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from transformers import BertConfig, BertModel

from plora_ray.config import AdapterSettings, EvaluationSettings
from plora_ray.errors import ConfigError, DataError
from plora_ray.evaluation.comparison import LABEL_PRIOR, POPULATION, WITH_USER, Comparison, compare
from plora_ray.evaluation.metrics import holm, log_softmax
from plora_ray.evaluation.page import comparison_table, groups_table
from plora_ray.evaluation.parts import held_together
from plora_ray.evaluation.protocols import BASELINES, evaluate_store
from plora_ray.evaluation.runs import compare_runs
from plora_ray.evaluation.verdict import verdict
from plora_ray.sizing import Demand, ModelShape, load_figures, load_prices, make_plan, monthly_cost

if TYPE_CHECKING:
    from tests.evaluation.conftest import World

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def folder(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "deeper"
    evaluate_store(world.settings, "all", list(BASELINES), folder)
    return folder


def test_the_folder_holds_json_html_and_plots(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {"report.json", "report.html", "gain_per_user.png", "few_shot.png"}
    assert all(path.read_bytes().startswith(PNG) for path in folder.glob("*.png"))
    report = json.loads((folder / "report.json").read_text())
    assert report["generation"] == "g1" and report["plots"] == ["gain_per_user.png", "few_shot.png"]


def test_the_html_stands_alone(folder: Path) -> None:
    html = (folder / "report.html").read_text()
    sources = re.findall(r'src="([^"]*)"', html)
    assert len(sources) == 2 and all(base64.b64decode(source.removeprefix("data:image/png;base64,")).startswith(PNG) for source in sources)
    assert "<link" not in html and "<script" not in html and "http" not in html
    assert json.loads((folder / "report.json").read_text())["verdict"].split(":")[0] in html


def test_the_page_tells_p_of_every_gain_and_what_becomes_of_users_as_users(folder: Path) -> None:
    html, full = (folder / "report.html").read_text(), json.loads((folder / "report.json").read_text())["protocols"]["full"]
    assert f"p&nbsp;{full['gain_over']['population']['nll']['p']:.2g}</span>" in html
    assert f"with user {full['predictors']['with_user']['mean_over_users']['nll']:.4f}, without user (population)" in html
    assert f"gain least: {full['user_gains']['worst_decile']:+.4f} a row" in html


def test_no_file_names_a_user_or_quotes_a_text(world: World, folder: Path) -> None:
    keys = [world.store.key(secret).hex() for secret in world.secrets if "person" in secret]
    for path in folder.iterdir():
        content = path.read_bytes()
        assert not [secret for secret in [*world.secrets, *keys] if secret.encode() in content]


def test_pictures_of_an_earlier_run_do_not_stay_beside_other_numbers(world: World, tmp_path: Path) -> None:
    evaluate_store(world.settings, "full", [], tmp_path)
    evaluate_store(world.settings, "zero", [], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.html"}


def comparison(with_user: float, population: float, users: int = 50, **others: float) -> Comparison:
    """Fifty users of ten rows; each predictor is right on the given share of every user's rows, at random. others: names with _ for -."""
    generator = np.random.default_rng(0)
    labels = np.zeros(10 * users, np.int64)

    def right(share: float) -> np.ndarray:
        return np.log(np.where(generator.random(len(labels))[:, None] < share, [[0.8, 0.2]], [[0.2, 0.8]]))

    predicted = {WITH_USER: right(with_user), POPULATION: right(population)}
    predicted |= {name.replace("_", "-"): right(share) for name, share in others.items()}
    return compare(WITH_USER, predicted, labels, np.repeat(np.arange(users), 10), "classification")


def test_the_verdict_says_gain_only_where_the_interval_is_above_zero() -> None:
    assert "without: a gain of" in verdict(comparison(0.9, 0.6), (), None)


def test_the_verdict_says_so_when_no_gain_could_be_shown() -> None:
    assert "no gain could be shown" in verdict(comparison(0.7, 0.7), (), None)


def test_the_verdict_says_so_when_the_users_are_worse_off() -> None:
    assert "a LOSS of" in verdict(comparison(0.5, 0.9), (), None)


def test_the_verdict_concludes_nothing_from_a_handful_of_users() -> None:
    assert "too few to conclude" in verdict(comparison(0.9, 0.5, users=4), (), None)


def test_the_verdict_names_trained_baselines_that_do_better_and_counts_those_that_are_beaten() -> None:
    said = verdict(comparison(0.8, 0.6, lora_per_user=0.95, population_lora=0.6, plora_released=0.5), (), None)
    assert (
        "Of 3 trained baselines, in the negative log-likelihood, 2 are beaten beyond noise; BETTER beyond noise: lora-per-user (by 0."
        in said
    )
    alone = verdict(comparison(0.9, 0.6, lora_per_user=0.5, shuffled_users=0.5), (), None)
    assert "Of 1 trained baseline, in the negative log-likelihood, 1 is beaten beyond noise." in alone, "the control isn't counted"
    assert "0 are beaten beyond noise; level: lora-per-user." in verdict(comparison(0.9, 0.6, lora_per_user=0.9), (), None)
    assert "trained baselines" not in verdict(comparison(0.9, 0.6, label_prior=0.5), (), None)


def test_the_verdict_tells_the_likelihood_beside_a_baselines_accuracy() -> None:
    labels, users, right = np.zeros(500, np.int64), np.repeat(np.arange(50), 10), np.random.default_rng(0).random((500, 1)) < 0.8
    too_sure, unsure = np.log(np.where(right, [[0.6, 0.4]], [[1e-6, 1 - 1e-6]])), np.log(np.full((500, 2), [0.4, 0.6]))
    predicted = {WITH_USER: too_sure, POPULATION: unsure, LABEL_PRIOR: unsure}
    said = verdict(compare(WITH_USER, predicted, labels, users, "classification"), (), None)
    assert re.search(r"past labels alone, .* the adapters add .* to that; in negative log-likelihood, a LOSS of \d", said)


def test_of_many_groups_that_dont_differ_few_are_called_different() -> None:
    draw, called = np.random.default_rng(5), 0
    for _ in range(60):
        groups = {}
        for name in range(20):
            labels, users = draw.integers(0, 2, 60), np.repeat(np.arange(12), 5)
            predicted = {who: log_softmax(draw.normal(size=(60, 2))) for who in (WITH_USER, POPULATION)}
            groups[str(name)] = compare(WITH_USER, predicted, labels, users, "classification")
        raw = [group.gains[POPULATION]["nll"].p for group in groups.values()]
        found = held_together(groups)
        adjusted = [group.gains[POPULATION]["nll"].p for group in found.values()]
        assert (
            adjusted == pytest.approx(holm(raw)) and found["0"].gains[POPULATION]["nll"].mean == groups["0"].gains[POPULATION]["nll"].mean
        )
        called += min(adjusted) < 0.05
    assert called <= 8, "about 3 of 60 tables; without the adjustment it would be two in three"


def test_the_verdict_and_the_table_agree_on_what_is_shown() -> None:
    """Few users whose rows all went well: the bootstrap's interval lies above zero, and p says that so few users show little."""
    labels, users = np.zeros(30, np.int64), np.repeat(np.arange(15), 2)
    right = np.isin(np.arange(30), [0, 1, 2, 3, 4, 5])
    predicted = {
        WITH_USER: np.log(np.where((right | (np.arange(30) % 2 == 0))[:, None], [[0.8, 0.2]], [[0.2, 0.8]])),
        POPULATION: np.log(np.where((np.arange(30) % 2 == 0)[:, None], [[0.8, 0.2]], [[0.2, 0.8]])),
    }
    found = compare(WITH_USER, predicted, labels, users, "classification")
    gain = found.gains[POPULATION]["accuracy"]
    assert gain.low >= 0 and 0.05 < gain.p < 0.2
    said = verdict(found, (), None)
    assert "a gain of" not in said and f"p {gain.p:.2g}" in said
    assert 'class="better"' not in comparison_table(found)


def test_a_group_of_one_user_has_no_interval() -> None:
    labels, users = np.array([0, 1, 0, 1, 1]), np.zeros(5, np.int64)
    predicted = {WITH_USER: np.log([[0.6, 0.4]] * 5), POPULATION: np.log([[0.5, 0.5]] * 5)}
    table = groups_table({"alone": compare(WITH_USER, predicted, labels, users, "classification")})
    assert "one user" in table and "–" not in table and " to " not in table


def test_shares_of_users_are_unknown_where_nobody_can_be_judged(world: World, tmp_path: Path) -> None:
    few = [row for row in world.rows() if row["split"] == "train"] + [row for row in world.rows() if row["split"] == "test"][::4]
    settings = world.with_rows(few, tmp_path / "few.jsonl")
    for name in ("one", "other"):
        gains = evaluate_store(settings, "full", [], tmp_path / name)["protocols"]["full"]["user_gains"]
        assert gains["users_judged"] == 0 and gains["share_helped"] is gains["share_harmed"] is None
    compare_runs([tmp_path / "one", tmp_path / "other"], tmp_path / "both")
    assert "0.0 %" not in (tmp_path / "both" / "comparison.html").read_text().split("users harmed")[1]


def test_a_matrix_of_costs_is_in_every_table(world: World, tmp_path: Path) -> None:
    matrix = {"no": {"yes": 3.0}, "yes": {"no": 1.0}}
    settings = world.settings.model_copy(update={"evaluation": EvaluationSettings(cost_matrix=matrix)})
    evaluate_store(settings, "all", list(BASELINES), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "cost of the decision" in page.split("What the predictors cost")[1]


def test_every_report_says_what_predictors_cost(folder: Path, world: World) -> None:
    costs = json.loads((folder / "report.json").read_text())["predictor_costs"]
    assert set(costs) == {WITH_USER, POPULATION, "majority", "label-prior"}
    assert costs["majority"]["parameters_in_all"] == 2 and costs["label-prior"]["parameters_per_user"] == 2
    assert costs["label-prior"]["parameters_in_all"] == 2 + 2 * world.users_per_cohort
    assert "What the predictors cost" in (folder / "report.html").read_text()


def test_the_verdict_tells_who_gains_and_who_loses() -> None:
    said = verdict(comparison(0.5, 0.9), (), None)
    assert re.search(r"Of the 50 users with test rows enough to tell, 0 % gain beyond noise and (\d+) % lose", said)
    assert "beyond noise" not in verdict(comparison(0.5, 0.9, users=4), (), None)


def test_stars_have_their_own_columns() -> None:
    generator = np.random.default_rng(1)
    labels, users = generator.integers(0, 5, 200), np.repeat(np.arange(20), 10)
    predicted = {name: log_softmax(generator.normal(size=(200, 5))) for name in (WITH_USER, POPULATION)}
    page = comparison_table(compare(WITH_USER, predicted, labels, users, "classification", values=np.arange(1.0, 6.0)))
    assert all(f"<th>{column}</th>" in page for column in ("Brier", "ECE", "RMSE", "kappa"))


def test_groups_divide_the_rows_and_each_is_compared_alone(world: World, tmp_path: Path) -> None:
    columns = world.settings.data.columns.model_copy(update={"group": "cohort"})
    report = evaluate_store(world.with_data(columns=columns), "all", list(BASELINES), tmp_path)
    full, zero = report["protocols"]["full"], report["protocols"]["zero"]
    assert set(full["groups"]) == {"a"} and set(zero["groups"]) == {"b"}  # each cohort is asked about in one protocol
    assert full["groups"]["a"]["gain_over"] == full["gain_over"] and full["groups"]["a"]["rows"] == full["rows"]
    few = report["protocols"]["few"]
    assert few["groups"]["b"] == few["points"][-1], "few-shot: of the most examples"
    assert "By group" in (tmp_path / "report.html").read_text()


def test_prices_add_what_a_million_users_cost_as_plora_plan_reckons_it(world: World, tmp_path: Path) -> None:
    prices = tmp_path / "prices.yaml"
    prices.write_text("{currency: EUR, cpu_core_hour: 0.04, memory_gib_hour: 0.005, gpu_hour: 1.1, storage_gib_month: 0.023}")
    priced = world.settings.model_copy(update={"evaluation": EvaluationSettings(prices=prices, rps_per_million_users=50)})
    costs = evaluate_store(priced, "zero", [], tmp_path / "out")["costs"]
    plm = BertModel(BertConfig.from_pretrained(world.settings.model.name), add_pooling_layer=False)
    shape = ModelShape(
        parameters=sum(parameter.numel() for parameter in plm.parameters()),
        block_parameters=sum(parameter.numel() for parameter in plm.encoder.parameters()), hidden=32, layers=2,
    )  # fmt: skip
    demand = Demand(
        users=1_000_000, model=shape, rps=50, adapter=AdapterSettings(rank=4, user_dim=4), tokens=7, rows_per_user=world.train_rows
    )
    cost = monthly_cost(make_plan(demand, load_figures()), demand, load_prices(prices))
    assert costs["month"]["storage"] == round(cost.storage, 2) and costs["month"]["serving"] == round(cost.serving, 2)
    assert costs["month"]["total"] == pytest.approx(cost.total, rel=1e-3) and costs["currency"] == "EUR"
    assert "What it costs" in (tmp_path / "out" / "report.html").read_text()
    prices.write_text("currency: EUR")
    with pytest.raises(ConfigError, match="cpu_core_hour"):
        evaluate_store(priced, "zero", [], tmp_path / "never")


def test_a_column_of_names_is_no_group(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plora_ray.evaluation.rows.MOST_GROUPS", 10)
    columns = world.settings.data.columns.model_copy(update={"group": "text"})
    with pytest.raises(DataError, match="columns.group has more than 10 different values"):
        evaluate_store(world.with_data(columns=columns), "full", [], tmp_path)
    assert not list(tmp_path.iterdir())


def test_runs_stand_side_by_side_with_their_own_figures(world: World, folder: Path, tmp_path: Path) -> None:
    evaluate_store(world.with_data(test_fraction=0.1), "full", [], tmp_path / "other")
    lines = compare_runs([folder, tmp_path / "other"], tmp_path / "out")
    report = json.loads((folder / "report.json").read_text())["protocols"]
    assert [(line.run, line.protocol, line.examples) for line in lines if line.protocol != "few"] == [
        ("deeper", "full", None), ("other", "full", None), ("deeper", "zero", 0),
    ]  # fmt: skip
    full, few = report["full"], [line for line in lines if line.protocol == "few"]
    without, personal = full["predictors"]["population"]["nll"], full["predictors"]["with_user"]["nll"]
    mine = next(line for line in lines if line.protocol == "full" and line.run == "deeper")
    assert mine.metrics["nll"][:3] == (without, personal, full["gain_over"]["population"]["nll"]["mean"])
    assert [line.examples for line in few] == [point["examples"] for point in report["few"]["points"]]
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert "deeper" in page and "has the lowest NLL" in page and "within its interval lies" in page and "http" not in page
    assert len(json.loads((tmp_path / "out" / "comparison.json").read_text())) == len(lines)


def test_a_report_without_a_digest_is_shown_and_not_ranked(folder: Path, tmp_path: Path) -> None:
    old = json.loads((folder / "report.json").read_text())
    del old["data"]["test_rows_digest"]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(old))
    assert compare_runs([tmp_path / "one", tmp_path / "two"], tmp_path / "out")
    assert "nothing is ranked" in (tmp_path / "out" / "comparison.html").read_text()


def test_a_group_that_is_not_unicode_is_a_bad_row_and_nothing_is_written(world: World, tmp_path: Path) -> None:
    rows = [{**json.loads(line), "land": "K\ud83d"} for line in world.data.read_text().splitlines()]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = world.settings.data.columns.model_copy(update={"group": "land"})
    with pytest.raises(DataError, match="group is not valid Unicode"):
        evaluate_store(world.with_data(source=str(tmp_path / "rows.jsonl"), columns=columns), "full", [], tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_runs_on_other_rows_are_not_ranked(world: World, folder: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in world.data.read_text().splitlines()]
    other = {"no": "yes", "yes": "no"}
    flipped = [{**row, "label": other[row["label"]]} if row["split"] == "test" else row for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in flipped))
    evaluate_store(world.with_data(source=str(tmp_path / "rows.jsonl")), "full", [], tmp_path / "other")
    compare_runs([folder, tmp_path / "other"], tmp_path / "out")
    assert "nothing is ranked" in (tmp_path / "out" / "comparison.html").read_text()


@pytest.mark.parametrize("content", [None, "{}", "[1]", '{"data": {}, "protocols": []}', "not json"])
def test_a_folder_without_a_report_is_named(folder: Path, tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(ConfigError, match="report.json can't be read"):
        compare_runs([folder, tmp_path], tmp_path / "out")
    assert not (tmp_path / "out").exists()
