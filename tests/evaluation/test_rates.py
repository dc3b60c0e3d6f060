"""A trained baseline may learn at the rate that suits it: several are tried, and validation rows choose."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from plora_ray.adapters.calibration import SCALES
from plora_ray.config import Settings, parse_settings
from plora_ray.errors import ConfigError, ModelError
from plora_ray.evaluation.labelled import LabelledTexts
from plora_ray.evaluation.progress import Stages
from plora_ray.evaluation.protocols import evaluate_store
from plora_ray.evaluation.rivals.panel import setup_of
from plora_ray.evaluation.rivals.rates import BestRate
from plora_ray.evaluation.rivals.registry import RIVALS, build_rivals
from plora_ray.evaluation.rivals.rival import RivalSetup
from plora_ray.evaluation.rows import read_rows
from plora_ray.inference import load_generation

if TYPE_CHECKING:
    from tests.evaluation.conftest import World

OWN_RATE = 1e-2  # of IA3 and prefix tuning


def ignore(rows: int) -> None:
    """Nobody watches."""


def settings_of(world: World, folder: Path, rates: list[float], *, rate: float = 1e-3) -> Settings:
    watched, _ = world.with_validation_rows(folder)
    values = {**watched.model_dump(mode="json", exclude_unset=True), "evaluation": {"baseline_rates": rates}}
    training = {"epochs": 2, "batch_rows": 64, "learning_rate": rate, "num_workers": 1, "partitions": 1}
    return parse_settings({**values, "training": training})


def setup_and_rows(world: World, settings: Settings) -> tuple[RivalSetup, LabelledTexts]:
    loaded = load_generation(world.store)
    with Stages() as stages:
        stages.begin("reading", 0)
        rows = read_rows(settings.data, world.store, loaded.reader, loaded.labels, examples_kept=4, on_unit=stages.at, keep_training=True)
    assert rows.training is not None
    return setup_of(settings, loaded, rows), rows.training


class Guesser:
    """Answers every text alike: class 1 is `odds` times as likely, its course's learning rate. Diverges above 100, is no number at 50."""

    def __init__(self, setup: RivalSetup) -> None:
        self.odds = setup.course.learning_rate
        self.met = 0

    def fit(self, rows: LabelledTexts, advance: object) -> None:
        if self.odds > 100:
            raise ModelError("a baseline's training loss became nan")

    def meet(self, rows: LabelledTexts, advance: object) -> None:
        self.met += len(rows.texts)

    def logits(self, users: np.ndarray, texts: list[str]) -> np.ndarray:
        row = [0.0, np.nan if self.odds == 50 else np.log(self.odds)]
        return np.tile(np.array(row, np.float32), (len(texts), 1))


def test_the_rate_taken_is_the_one_whose_calibrated_answers_are_likeliest_on_validation_rows(world: World, tmp_path: Path) -> None:
    setup, training = setup_and_rows(world, settings_of(world, tmp_path, [1, 4, 0.25, 50, 1000], rate=1.0))
    labels = setup.targets(setup.validation)
    learnt = setup.targets(training)
    ones = int((learnt == 1).sum())
    base = torch.log(torch.tensor([len(learnt) - ones + 1, ones + 1]) / (len(learnt) + 2)).double()
    found = BestRate(Guesser, setup, setup.settings.evaluation.baseline_rates)
    found.fit(training, ignore)
    for factor in (1, 4, 0.25):
        logits = torch.tensor([0.0, np.log(factor)], dtype=torch.float64)
        losses = [F.cross_entropy((base + scale * (logits - base)).expand(len(labels), 2), labels) for scale in SCALES]
        assert found.tried.losses[factor] == pytest.approx(float(min(losses)), abs=1e-5)
    assert [found.tried.losses[factor] for factor in (50, 1000)] == [float("inf")] * 2, "what diverges isn't taken"
    best = min((1, 4, 0.25), key=found.tried.losses.__getitem__)
    assert found.tried.taken == best
    assert found.logits(np.array([0]), ["a"])[0, 1] == pytest.approx(np.log(best), abs=1e-6)
    assert found.tried.to_json()["validation_loss"]["1000"] is None


def test_that_every_rate_diverges_or_that_nothing_can_choose_is_one_line(world: World, tmp_path: Path) -> None:
    setup, training = setup_and_rows(world, settings_of(world, tmp_path, [200, 1000], rate=1.0))
    with pytest.raises(ModelError, match=r"diverged at each of evaluation\.baseline_rates"):
        BestRate(Guesser, setup, (200.0, 1000.0)).fit(training, ignore)
    with pytest.raises(ConfigError, match="no validation rows to choose by"):
        BestRate(Guesser, replace(setup, validation=LabelledTexts.of_rows([])), (1.0, 2.0))


@pytest.mark.parametrize("name", ["population-lora", "lora-per-user", "user-identifier-bitfit", "user-identifier-ia3", "plora-end-to-end"])
def test_a_factor_is_on_the_baselines_own_rate(world: World, tmp_path: Path, name: str) -> None:
    plain, training = setup_and_rows(world, settings_of(world, tmp_path, [1]))
    threefold = replace(plain, settings=settings_of(world, tmp_path, [3]))
    if name == "user-identifier-ia3":
        slow, fast = OWN_RATE, 3 * OWN_RATE
        rates = [build_rivals([name], setup)[name]._course.learning_rate for setup in (plain, threefold)]
        assert rates == pytest.approx([slow, fast])
        return
    answers = []
    for setup in (threefold, plain.at(3.0), plain):
        rival = build_rivals([name], setup)[name]
        rival.fit(training, ignore)
        answers.append(rival.logits(training.users[:8], training.texts[:8]))
    np.testing.assert_array_equal(answers[0], answers[1])
    assert np.abs(answers[0] - answers[2]).max() > 1e-3


def test_a_report_says_which_rates_were_tried_and_taken_but_leaves_the_published_and_our_own_alone(world: World, tmp_path: Path) -> None:
    names = [name for name in RIVALS if name not in ("shuffled-users", "user-identifier-prefix")]
    report = evaluate_store(settings_of(world, tmp_path, [0.1, 30]), "full", names, tmp_path / "out")
    tried = report["baseline_rates"]
    assert set(tried) == set(names) - {"plora-released"}
    for name, found in tried.items():
        losses = found["validation_loss"]
        assert set(losses) == {"0.1", "30"} and losses[f"{found['taken']:g}"] == min(losses.values()), name
    page = (tmp_path / "out" / "report.html").read_text()
    assert "validation rows chose 0.1 or 30 times the usual one" in page


@pytest.mark.parametrize("rates", [[], [0], [-1], ["nan"], ["inf"]])
def test_rates_that_are_no_rates_are_refused(rates: list[object]) -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.baseline_rates"):
        parse_settings({"data": {"source": "rows.jsonl"}, "store": {"uri": "memory://x"}, "evaluation": {"baseline_rates": rates}})
