"""Predictors side by side on the same rows: each one's scores, and what one of them gains over the others, user by user.

Knows arrays of predictions and labels; doesn't know how a prediction came about or how it is shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plora_ray.adapters.model import Task
from plora_ray.evaluation.metrics import (
    Floats,
    Ints,
    Scores,
    as_json,
    bootstrap_by_user,
    classification_scores,
    means_by_user,
    paired,
    regression_scores,
    row_nll,
)

# The predictors' names, as reports have them. The last three are also the baselines that can be asked for.
WITH_USER, MAJORITY, LABEL_PRIOR, POPULATION = "with_user", "majority", "label-prior", "population"
HISTOGRAM_BINS = 30


@dataclass(frozen=True)
class Interval:
    """A mean over rows with its 95 % interval, bootstrapped by user."""

    mean: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        return {name: round(value, 5) for name, value in vars(self).items()}


@dataclass(frozen=True)
class PredictorScores:
    """scores: over rows. intervals: of accuracy and nll, or of mse. by_user: the same means when every user counts alike."""

    scores: Scores
    intervals: dict[str, Interval]
    by_user: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        return {
            **as_json(self.scores),
            "intervals": {name: interval.to_json() for name, interval in self.intervals.items()},
            "mean_over_users": {name: round(value, 5) for name, value in self.by_user.items()},
        }


@dataclass(frozen=True)
class Comparison:
    """Predictors on the same rows. subject: the one that the generation answers with.

    gains: by other predictor and metric, what the subject gains over it; positive is better, whatever the metric.
    user_gains: [users] each user's own gain over the population in nll or mse; empty if the subject is the population.
    examples: how many examples of each user the subject and the label prior have seen; None for a trained user.
    """

    subject: str
    users: int
    rows: int
    predictors: dict[str, PredictorScores]
    gains: dict[str, dict[str, Interval]]
    user_gains: Floats = field(repr=False)
    examples: int | None = None

    def to_json(self) -> dict[str, Any]:
        gains = {over: {metric: gain.to_json() for metric, gain in found.items()} for over, found in self.gains.items()}
        return {
            **({} if self.examples is None else {"examples": self.examples}),
            "subject": self.subject,
            "users": self.users,
            "rows": self.rows,
            "predictors": {name: scores.to_json() for name, scores in self.predictors.items()},
            "gain_over": gains,
            **({"user_gains": _histogram(self.user_gains)} if self.user_gains.size else {}),
        }


def compare(
    subject: str,
    predicted: Mapping[str, Floats],
    labels: NDArray[np.number],
    row_users: Ints,
    task: Task,
    *,
    examples: int | None = None,
    seed: int = 0,
) -> Comparison:
    """Score every predictor and pair `subject` with each other one.

    predicted: by name, log-probabilities [rows, classes], or values [rows] of a regression. Needs at least one row.
    """
    costs = {name: _row_costs(values, labels, task) for name, values in predicted.items()}
    metric = "nll" if task == "classification" else "mse"
    own = costs[subject]
    gains = {
        over: {name: Interval(**paired(own[name], theirs[name], row_users, seed)) for name in theirs}
        for over, theirs in costs.items()
        if over != subject
    }
    personal = subject != POPULATION and POPULATION in costs
    return Comparison(
        subject=subject,
        users=len(np.unique(row_users)),
        rows=len(labels),
        predictors={name: _scored(values, costs[name], labels, row_users, task, seed) for name, values in predicted.items()},
        gains=gains,
        user_gains=means_by_user(costs[POPULATION][metric] - own[metric], row_users) if personal else np.empty(0),
        examples=examples,
    )


def _row_costs(predicted: Floats, labels: NDArray[np.number], task: Task) -> dict[str, Floats]:
    """By metric, what every row [rows] adds to it, signed so that less is better."""
    if task == "regression":
        return {"mse": (predicted - labels.astype(np.float64)) ** 2}
    classes = labels.astype(np.int64)
    return {"accuracy": -(predicted.argmax(axis=1) == classes).astype(np.float64), "nll": row_nll(predicted, classes)}


def _scored(
    predicted: Floats, costs: dict[str, Floats], labels: NDArray[np.number], row_users: Ints, task: Task, seed: int
) -> PredictorScores:
    values = {name: -cost if name == "accuracy" else cost for name, cost in costs.items()}
    regression = task == "regression"
    return PredictorScores(
        scores=regression_scores(predicted, labels.astype(float)) if regression else classification_scores(predicted, labels.astype(int)),
        intervals={name: Interval(float(value.mean()), *bootstrap_by_user(value, row_users, seed)) for name, value in values.items()},
        by_user={name: float(means_by_user(value, row_users).mean()) for name, value in values.items()},
    )


def _histogram(gains: Floats) -> dict[str, Any]:
    counts, edges = np.histogram(gains, bins=HISTOGRAM_BINS)
    better = float((gains > 0).mean())
    return {"edges": [round(float(edge), 5) for edge in edges], "users": counts.tolist(), "share_better": round(better, 5)}
