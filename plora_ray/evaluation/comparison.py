"""Predictors side by side on the same rows: each one's scores, and what one of them gains over the others, user by user.

Knows arrays of predictions and labels; doesn't know how a prediction came about or how it is shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plora_ray.adapters.model import Task
from plora_ray.evaluation.costs import Costs
from plora_ray.evaluation.metrics import (
    ClassificationTotals,
    Floats,
    Ints,
    RegressionTotals,
    Scores,
    as_json,
    bootstrap_ratios,
    holm,
    p_value,
    rounded,
    row_nll,
)
from plora_ray.evaluation.user_gains import UserGains

# The predictors' names, as reports have them. The last three are also the baselines that can be asked for.
WITH_USER, MAJORITY, LABEL_PRIOR, POPULATION = "with_user", "majority", "label-prior", "population"
SHUFFLED = "shuffled-users"  # a trained baseline that is a control: it must be no better than the population
SHOWN_BELOW = 0.05  # p of a gain that is called one


@dataclass(frozen=True)
class Interval:
    """A mean over rows with its 95 % interval, bootstrapped by user."""

    mean: float
    low: float
    high: float

    @classmethod
    def around(cls, mean: float, low: float, high: float) -> Interval:
        """The ends of one drawn user's mean may miss it by a rounding error."""
        return cls(mean, min(low, mean), max(high, mean))

    def to_json(self) -> dict[str, float]:
        return {name: rounded(value) for name, value in vars(self).items()}


@dataclass(frozen=True)
class Gain(Interval):
    """p: two-sided p-value of no gain, users drawn as a whole, adjusted for the other predictors compared (Holm)."""

    p: float = 1.0

    def to_json(self) -> dict[str, float]:
        return {**Interval(self.mean, self.low, self.high).to_json(), "p": float(f"{self.p:.3g}")}


@dataclass(frozen=True)
class PredictorScores:
    """scores: over rows. intervals: of accuracy and nll (and costs, if there are any), or of mse. by_user: the same means when every
    user counts alike."""

    scores: Scores
    intervals: dict[str, Interval]
    by_user: dict[str, float]

    @property
    def figures(self) -> dict[str, float | int]:
        """All of them by name, rounded."""
        scores = as_json(self.scores)
        return scores | {name: rounded(interval.mean) for name, interval in self.intervals.items() if name not in scores}

    def to_json(self) -> dict[str, Any]:
        return {
            **self.figures,
            "intervals": {name: interval.to_json() for name, interval in self.intervals.items()},
            "mean_over_users": {name: rounded(value) for name, value in self.by_user.items()},
        }


@dataclass(frozen=True)
class Comparison:
    """Predictors on the same rows. subject: the one that the generation answers with.

    gains: by other predictor and metric, what the subject gains over it; positive is better, whatever the metric.
    user_gains: each user's own gain over the population in nll or mse; None if the subject is the population.
    examples: how many examples of each user the subject and the label prior have seen; None for a trained user.
    """

    subject: str
    users: int
    rows: int
    predictors: dict[str, PredictorScores]
    gains: dict[str, dict[str, Gain]]
    user_gains: UserGains | None = field(repr=False)
    examples: int | None = None

    @property
    def loss(self) -> str:
        """What user_gains are in: nll or mse."""
        return "nll" if "nll" in self.predictors[self.subject].intervals else "mse"

    def to_json(self) -> dict[str, Any]:
        gains = {over: {metric: gain.to_json() for metric, gain in found.items()} for over, found in self.gains.items()}
        return {
            **({} if self.examples is None else {"examples": self.examples}),
            "subject": self.subject,
            "users": self.users,
            "rows": self.rows,
            "predictors": {name: scores.to_json() for name, scores in self.predictors.items()},
            "gain_over": gains,
            **({"user_gains": self.user_gains.to_json()} if self.user_gains else {}),
        }


class ComparisonTotals:
    """Rows of a comparison, added in pieces: holds totals, and of each user with rows a few numbers a predictor and metric.

    subject: the predictor whose gains are asked for. outputs: classes (1 for a regression). values: [classes] as numbers, if they are.
    costs: of errors, which make metrics of their own.
    """

    def __init__(self, subject: str, task: Task, outputs: int, values: Floats | None = None, costs: Costs | None = None) -> None:
        self._subject, self._task, self._outputs, self._values, self._matrix = subject, task, outputs, values, costs
        self._scores: dict[str, ClassificationTotals | RegressionTotals] = {}
        self._columns: list[tuple[str, str]] = []
        self._costs = np.zeros(0)
        self._user_costs: list[Floats] = []
        self._user_squares: list[Floats] = []
        self._user_rows: list[NDArray[np.int32]] = []

    def add(self, predicted: Mapping[str, Floats], labels: NDArray[np.number], row_users: Ints) -> None:
        """Count all rows of some users, who mustn't come again; none is fine.

        predicted: by name, log-probabilities [rows, classes], or values [rows] of a regression; the same names in every call.
        """
        if not len(labels):
            return
        costs = {(name, metric): cost for name, values in predicted.items() for metric, cost in self._row_costs(values, labels).items()}
        if not self._columns:
            self._columns, self._costs = list(costs), np.zeros(len(costs))
            self._scores = {name: self._empty() for name in predicted}
        for name, values in predicted.items():
            self._scores[name].add(values, labels.astype(np.float64 if self._regression else np.int64))
        _, index = np.unique(row_users, return_inverse=True)
        self._costs += [cost.sum(dtype=np.float64) for cost in costs.values()]
        self._user_costs.append(np.stack([np.bincount(index, weights=cost) for cost in costs.values()], axis=1))
        squares = [np.bincount(index, weights=gain**2) for gain in self._row_gains(costs)]
        self._user_squares.append(np.stack(squares, axis=1))
        self._user_rows.append(np.bincount(index).astype(np.int32))

    def result(self, *, examples: int | None = None, seed: int = 0) -> Comparison:
        """Everything added, which must be one row at least. examples: see Comparison."""
        costs, rows = self._by_user()
        gained = self._gained(list(self._scores))
        sums = np.column_stack([costs, self._user_gains(costs, gained)])
        means = [*self._costs, *(self._costs[over] - self._costs[own] for own, over in gained.values())] / rows.sum(dtype=np.int64)
        found = [Interval.around(float(mean), *ends) for mean, ends in zip(means, bootstrap_ratios(sums, rows, seed), strict=True)]
        values = {column: _as_value(column[1], found[index]) for index, column in enumerate(self._columns)}
        by_user = {column: float((costs[:, index] / rows).mean(dtype=np.float64)) for index, column in enumerate(self._columns)}
        gains: dict[str, dict[str, Gain]] = {over: {} for over in self._scores if over != self._subject}
        p_values = self._p_values(gained, sums[:, len(self._columns) :], rows)
        for (over, metric), gain in zip(gained, found[len(self._columns) :], strict=True):
            gains[over][metric] = Gain(gain.mean, gain.low, gain.high, p_values[over, metric])
        return Comparison(
            subject=self._subject,
            users=len(rows),
            rows=int(rows.sum(dtype=np.int64)),
            predictors={
                name: PredictorScores(
                    scores=self._scores[name].scores(),
                    intervals={metric: value for (owner, metric), value in values.items() if owner == name},
                    by_user={metric: _unsigned(metric, mean) for (owner, metric), mean in by_user.items() if owner == name},
                )
                for name in self._scores
            },
            gains=gains,
            user_gains=self.user_gains().get("mse" if self._regression else "nll"),
            examples=examples,
        )

    def user_gains(self) -> dict[str, UserGains]:
        """By metric, the gains over the population of the users with rows, as added; none where the subject is the population."""
        costs, rows = self._by_user()
        gained = self._gained([POPULATION])
        sums = self._user_gains(costs, gained)
        return {metric: UserGains.of(sums[:, place], self._user_squares[0][:, place], rows) for place, (_, metric) in enumerate(gained)}

    def gains_of(self, users: Ints, seed: int = 0) -> dict[str, Interval]:
        """By metric, what the subject gains over the population on the rows of `users` (places in the order of adding)."""
        gained = self._gained([POPULATION])
        costs, rows = self._by_user()
        sums, rows = self._user_gains(costs[users], gained), rows[users]
        means = sums.sum(axis=0, dtype=np.float64) / rows.sum(dtype=np.int64)
        ends = bootstrap_ratios(sums, rows, seed)
        return {metric: Interval(float(mean), *end) for (_, metric), mean, end in zip(gained, means, ends, strict=True)}

    def _by_user(self) -> tuple[Floats, NDArray[np.int32]]:
        """Sums of costs [users, columns] and numbers of rows [users]; from now on in one piece, as are the squares of gains."""
        self._user_costs, self._user_rows = [np.concatenate(self._user_costs)], [np.concatenate(self._user_rows)]
        self._user_squares = [np.concatenate(self._user_squares)]
        return self._user_costs[0], self._user_rows[0]

    @property
    def _regression(self) -> bool:
        return self._task == "regression"

    def _gained(self, others: Sequence[str]) -> dict[tuple[str, str], tuple[int, int]]:
        """By (other predictor, metric), the columns of the subject and of the other."""
        place = {column: index for index, column in enumerate(self._columns)}
        return {
            (name, metric): (place[self._subject, metric], index)
            for (name, metric), index in place.items()
            if name in others and name != self._subject
        }

    def _empty(self) -> ClassificationTotals | RegressionTotals:
        return RegressionTotals() if self._regression else ClassificationTotals(self._outputs, self._values)

    def _row_gains(self, costs: Mapping[tuple[str, str], Floats]) -> list[Floats]:
        """By metric, what every row [rows] gains over the population; one empty column where there is nothing to gain."""
        return [costs[over, metric] - costs[self._subject, metric] for over, metric in self._gained([POPULATION])] or [
            np.zeros_like(next(iter(costs.values())))
        ]

    @staticmethod
    def _p_values(gained: Mapping[tuple[str, str], tuple[int, int]], sums: Floats, rows: NDArray[np.int32]) -> dict[tuple[str, str], float]:
        """Of every gain [users, gains], adjusted over the predictors that one metric compares."""
        raw = {column: p_value(sums[:, place], rows) for place, column in enumerate(gained)}
        adjusted: dict[tuple[str, str], float] = {}
        for metric in dict.fromkeys(metric for _, metric in gained):
            columns = [column for column in gained if column[1] == metric]
            adjusted |= dict(zip(columns, holm([raw[column] for column in columns]), strict=True))
        return adjusted

    @staticmethod
    def _user_gains(costs: Floats, gained: Mapping[tuple[str, str], tuple[int, int]]) -> Floats:
        """[users, gains] sums over each user's rows."""
        own, over = (np.array([pair[side] for pair in gained.values()], np.int64) for side in (0, 1))
        return costs[:, over] - costs[:, own]

    def _row_costs(self, predicted: Floats, labels: NDArray[np.number]) -> dict[str, Floats]:
        """By metric, what every row [rows] adds to it, signed so that less is better."""
        if self._regression:
            return {"mse": (predicted - labels.astype(np.float64)) ** 2}
        classes = labels.astype(np.int64)
        right = {"accuracy": -(predicted.argmax(axis=1) == classes).astype(np.float64), "nll": row_nll(predicted, classes)}
        return right if self._matrix is None else right | self._matrix.of_rows(predicted, classes)


def examples_told(count: int) -> str:
    """So many examples, in words as reports and progress have them."""
    return f"{count} example" if count == 1 else f"{count} examples"


def compare(
    subject: str,
    predicted: Mapping[str, Floats],
    labels: NDArray[np.number],
    row_users: Ints,
    task: Task,
    *,
    values: Floats | None = None,
    costs: Costs | None = None,
    examples: int | None = None,
    seed: int = 0,
) -> Comparison:
    """Score every predictor and pair `subject` with each other one: `ComparisonTotals` of rows that are all at hand.

    predicted: by name, log-probabilities [rows, classes], or values [rows] of a regression. Needs at least one row.
    values, costs: see ComparisonTotals.
    """
    totals = ComparisonTotals(subject, task, next(iter(predicted.values())).shape[-1] if task == "classification" else 1, values, costs)
    totals.add(predicted, labels, row_users)
    return totals.result(examples=examples, seed=seed)


def _unsigned(metric: str, cost: float) -> float:
    """The figure itself: accuracy counts as a cost with the other sign."""
    return 0.0 - cost if metric == "accuracy" else cost  # not -cost, which is -0.0 of nothing right


def _as_value(metric: str, cost: Interval) -> Interval:
    """As `_unsigned`, with the interval's ends."""
    return Interval(*(_unsigned(metric, end) for end in (cost.mean, cost.high, cost.low))) if metric == "accuracy" else cost
