"""The table over seeds: its figures are scikit-learn's, and more seeds of the same users don't look like more users."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import accuracy_score, f1_score, log_loss

from benchmarks.quality_table import Point, lines_of, markdown

COST = {"parameters_per_user": 4, "parameters_in_all": 100, "stored_bytes": 400, "seconds_per_request": 0.01}


BASE = [-1.0, -0.5, -2.0]


def point(seed: int) -> Point:
    """30 users of 8 rows; the subject is right more often than the population."""
    chance = np.random.default_rng(seed)
    labels = chance.integers(0, 3, 240)
    predicted = {}
    for name, strength in (("with_user", 2.0), ("population", 1.0), ("population-lora", 0.9)):
        logits = chance.normal(size=(240, 3)) + strength * np.eye(3)[labels]
        predicted[name] = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return Point("full", None, predicted, labels, np.repeat(np.arange(30), 8))


def test_a_line_has_scikit_learns_figures_of_all_seeds_together() -> None:
    points = [Point.from_json(point(seed).to_json()) for seed in (0, 1)]
    lines = lines_of(
        [[points[0]], [points[1]]],
        [{"population": COST}] * 2,
        [{"population-lora": {"known": {"scale": scale, "base": BASE}, "new": {"scale": 9.0, "base": BASE}}} for scale in (0.5, 2.0)],
    )
    labels = np.concatenate([found.labels for found in points])
    for line in lines:
        predicted = np.concatenate([found.predicted[line["predictor"]] for found in points])
        assert line["accuracy"]["mean"] == pytest.approx(accuracy_score(labels, predicted.argmax(1)), abs=1e-5)
        assert line["macro_f1"]["mean"] == pytest.approx(f1_score(labels, predicted.argmax(1), average="macro"), abs=1e-5)
        assert line["nll"]["mean"] == pytest.approx(log_loss(labels, np.exp(predicted)), abs=1e-4)
        assert line["macro_f1"]["low"] < line["macro_f1"]["mean"] < line["macro_f1"]["high"]
    uncalibrated = [
        log_loss(found.labels, softmax(np.array(BASE) + (found.predicted["population-lora"] - BASE) / scale, axis=1))
        for found, scale in zip(points, (0.5, 2.0), strict=True)
    ]
    expected = {"population-lora": pytest.approx(np.mean(uncalibrated), abs=1e-4), "population": None, "with_user": None}
    assert {line["predictor"]: line["nll_as_trained"] for line in lines} == expected
    ours, theirs = (
        [log_loss(found.labels, np.exp(found.predicted[name])) for found in points] for name in ("with_user", "population-lora")
    )
    line = next(line for line in lines if line["predictor"] == "population-lora")
    assert line["gain_of_seeds"] == pytest.approx(np.subtract(theirs, ours), abs=1e-4)
    assert line["over_population"]["mean"] == pytest.approx(
        line["gain"]["mean"] * -1 + next(other["gain"]["mean"] for other in lines if other["predictor"] == "population"), abs=1e-4
    )
    assert "| population |" in markdown(lines) and "| 10.0 |" in markdown(lines)


def test_the_same_seed_three_times_gives_the_interval_and_the_p_value_of_once() -> None:
    once, thrice = (lines_of([[point(0)]] * count, [{}] * count, [{}] * count) for count in (1, 3))
    for one, three in zip(once, thrice, strict=True):
        for name in ("accuracy", "nll", "macro_f1", "gain"):
            if one[name] is not None:
                assert three[name] == pytest.approx(one[name], rel=1e-3)
        assert one["harmed"] == three["harmed"]
