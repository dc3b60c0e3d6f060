"""Figures of merit from labels and logits, over rows and over users, with bootstrap intervals. Pure numpy.

Scores come from totals that rows are added to in any number of pieces, so nothing here needs all rows at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]

ECE_BINS = 15
SMALL = 1e-3  # of a figure: five places would leave less than three figures of it
BOOTSTRAP_ROUNDS = 1000
BOOTSTRAP_DRAWS_AT_ONCE = 4_000_000  # of users: bounds the index arrays to some tens of megabytes
SAME = 1e-9  # of a mean: an error below it is rounding
NORMAL_ABOVE_USERS = 50_000  # from here the means are normal to three digits, and their variance needs no draws


@dataclass(frozen=True)
class OrderedScores:
    """Of classes that are numbers: mean squared error of the class answered, its root, mean absolute error; kappa: Cohen's, quadratic."""

    mse: float
    rmse: float
    mae: float
    kappa: float


@dataclass(frozen=True)
class ClassificationScores:
    """accuracy, macro_f1 (over the classes present), nll (mean negative log-likelihood, nats) over `rows` rows.

    brier: mean squared distance of the probabilities from the label's, 0 to 2 (Brier 1950). ece: expected calibration error of the
    class answered, in ECE_BINS bins of equal width (Guo et al. 2017). ordered: where the classes are numbers.
    """

    rows: int
    accuracy: float
    macro_f1: float
    nll: float
    brier: float
    ece: float
    ordered: OrderedScores | None = None


@dataclass(frozen=True)
class RegressionScores:
    """Mean squared error, its root, mean absolute error, and R squared against the mean, in units of the label, over `rows` rows."""

    rows: int
    mse: float
    rmse: float
    mae: float
    r2: float


Scores = ClassificationScores | RegressionScores


def log_softmax(logits: Floats) -> Floats:
    """Log-probabilities [rows, classes]."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_probabilities: Floats = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return log_probabilities


def row_nll(log_probabilities: Floats, labels: Ints) -> Floats:
    """Negative log-likelihood of every row [rows]."""
    nll: Floats = -log_probabilities[np.arange(len(labels)), labels]
    return nll


class ClassificationTotals:
    """What `rows` so far add up to, over `classes` classes; numbers of rows that were right, labelled and answered so, by class.

    values: [classes] the classes as numbers, where they have an order.
    """

    def __init__(self, classes: int, values: Floats | None = None) -> None:
        self._right, self._labelled, self._chosen = np.zeros((3, classes), np.int64)
        self._nll = self._brier = 0.0
        self._bins = np.zeros((2, ECE_BINS))  # sums of confidences, numbers of right answers
        self._values = values
        self._errors = np.zeros(2)  # sums of squared and absolute differences of the classes' values

    def add(self, log_probabilities: Floats, labels: Ints) -> None:
        """Count log-probabilities [rows, classes] against class indices [rows]."""
        chosen, classes = log_probabilities.argmax(axis=1), len(self._right)
        probabilities, right = np.exp(log_probabilities), chosen == labels
        self._right += np.bincount(labels[right], minlength=classes)
        self._labelled += np.bincount(labels, minlength=classes)
        self._chosen += np.bincount(chosen, minlength=classes)
        self._nll += float(row_nll(log_probabilities, labels).sum(dtype=np.float64))
        of_label = probabilities[np.arange(len(labels)), labels]
        self._brier += float(((probabilities**2).sum(axis=1) - 2 * of_label + 1).sum(dtype=np.float64))
        confidence = probabilities.max(axis=1, initial=0.0)
        bins = np.minimum((confidence * ECE_BINS).astype(np.int64), ECE_BINS - 1)
        self._bins += [np.bincount(bins, weights=weights, minlength=ECE_BINS) for weights in (confidence, right.astype(np.float64))]
        if self._values is not None:
            away = self._values[chosen] - self._values[labels]
            self._errors += [(away**2).sum(), np.abs(away).sum()]

    def scores(self) -> ClassificationScores:
        """Scores of everything added, which must be one row at least."""
        rows, present = int(self._labelled.sum()), self._labelled > 0
        f1 = 2 * self._right[present] / (self._labelled + self._chosen)[present]
        return ClassificationScores(
            rows=rows, accuracy=float(self._right.sum() / rows), macro_f1=float(f1.mean()), nll=self._nll / rows, brier=self._brier / rows,
            ece=float(np.abs(self._bins[0] - self._bins[1]).sum() / rows), ordered=self._ordered(rows),
        )  # fmt: skip

    def _ordered(self, rows: int) -> OrderedScores | None:
        if self._values is None:
            return None
        squared, absolute = (float(value) / rows for value in self._errors)
        truth, answers = self._labelled / rows, self._chosen / rows
        # What independent answers of the same frequencies would be off by: E[(a - b)^2].
        by_chance = truth @ self._values**2 + answers @ self._values**2 - 2 * (truth @ self._values) * (answers @ self._values)
        kappa = round(float(1 - squared / by_chance), 12) if by_chance > 0 else 0.0  # what differs by less is rounding
        return OrderedScores(squared, squared**0.5, absolute, kappa)


class RegressionTotals:
    """What `rows` so far add up to. The labels' spread is merged piece by piece (Chan, Golub and LeVeque 1979): no cancellation."""

    def __init__(self) -> None:
        self._rows, self._squares, self._absolute = 0, 0.0, 0.0
        self._mean, self._spread = 0.0, 0.0

    def add(self, predicted: Floats, labels: Floats) -> None:
        """Count predictions [rows] against values [rows]."""
        if not len(labels):
            return
        error, rows = predicted - labels, self._rows + len(labels)
        self._squares += float((error**2).sum(dtype=np.float64))
        self._absolute += float(np.abs(error).sum(dtype=np.float64))
        away = float(labels.mean(dtype=np.float64)) - self._mean
        self._spread += float(labels.var(dtype=np.float64)) * len(labels) + away**2 * self._rows * len(labels) / rows
        self._mean += away * len(labels) / rows
        self._rows = rows

    def scores(self) -> RegressionScores:
        """Scores of everything added, which must be one row at least."""
        rows = self._rows
        r2 = 1 - self._squares / self._spread if self._spread else 0.0
        return RegressionScores(rows, self._squares / rows, (self._squares / rows) ** 0.5, self._absolute / rows, r2)


def classification_scores(log_probabilities: Floats, labels: Ints) -> ClassificationScores:
    """Scores of log-probabilities [rows, classes] against class indices [rows]; needs at least one row."""
    totals = ClassificationTotals(log_probabilities.shape[1])
    totals.add(log_probabilities, labels)
    return totals.scores()


def bootstrap_ratios(sums: Floats | Ints, rows: Floats | Ints, seed: int = 0) -> list[tuple[float, float]]:
    """95 % intervals of the mean over rows of each column, when whole users are drawn with replacement.

    sums: [users, columns] of each user's rows; rows: [users] how many they are. All columns see the same draws. With more than
    NORMAL_ABOVE_USERS users, the normal interval of a ratio of sums.
    """
    if len(rows) > NORMAL_ABOVE_USERS:
        return _normal_ratios(sums, rows)
    generator, users = np.random.default_rng(seed), len(rows)
    columns = np.column_stack([sums, rows]).astype(np.float64)
    means: list[Floats] = []
    while (left := BOOTSTRAP_ROUNDS - len(means)) > 0:
        for drawn in generator.integers(0, users, (min(left, max(1, BOOTSTRAP_DRAWS_AT_ONCE // users)), users)):
            totals = np.bincount(drawn, minlength=users) @ columns
            means.append(totals[:-1] / totals[-1])
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    return list(zip(low.tolist(), high.tolist(), strict=True))


def _normal_ratios(sums: Floats | Ints, rows: Floats | Ints) -> list[tuple[float, float]]:
    """Delta method, one column at a time: variance of sum(s) / sum(n) over users = sum((s - mean n)^2) / sum(n)^2."""
    intervals = []
    for column in sums.T:
        mean, error = ratio_and_error(column, rows)
        intervals.append((mean - 1.96 * error, mean + 1.96 * error))
    return intervals


def ratio_and_error(sums: Floats | Ints, rows: Floats | Ints) -> tuple[float, float]:
    """Mean over rows and its standard error, as users vary: the jackknife's, each user left out in turn; infinite for one user.

    sums, rows: [users] sums over each user's rows, and how many they are.
    """
    total, users = float(rows.sum(dtype=np.float64)), len(rows)
    mean = float(sums.sum(dtype=np.float64)) / total
    if users < 2:
        return mean, math.inf
    moved = (sums - mean * rows) / (total - rows)  # the mean, less the mean without this user
    return mean, math.sqrt((users - 1) / users * float((moved**2).sum(dtype=np.float64)))


def p_value(sums: Floats | Ints, rows: Floats | Ints) -> float:
    """Two-sided, of a mean over rows of zero, users drawn as a whole: few users show little, nor do a few with most of the rows.

    By Student's law for as many users as weigh alike would tell as much: 1 / sum of the squared shares of the rows. Where all users have
    the same mean, their number alone tells: the sign test's. sums, rows: [users], see `ratio_and_error`.
    """
    mean, error = ratio_and_error(sums, rows)
    if len(rows) < 2 or mean == 0:
        return 1.0
    if error <= SAME * abs(mean):
        return float(2.0 ** (1 - len(rows)))
    weighing = 1 / float(np.square(rows / rows.sum(dtype=np.float64)).sum())
    return float(2 * stats.t.sf(abs(mean) / error, weighing - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several tests, adjusted so that all hold together (Holm 1979)."""
    order, adjusted, largest = np.argsort(p_values), [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order.tolist()):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def bootstrap_by_user(values: Floats, users: Ints, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of `values` [rows] when whole users [rows] are drawn with replacement."""
    _, index = np.unique(users, return_inverse=True)
    return bootstrap_ratios(np.bincount(index, weights=values)[:, None], np.bincount(index), seed)[0]


def paired(better: Floats, worse: Floats, users: Ints, seed: int = 0) -> dict[str, float]:
    """Mean of worse - better per row (a gain when losses are given) with its 95 % interval, bootstrapped by user."""
    difference = worse - better
    low, high = bootstrap_by_user(difference, users, seed)
    return {"mean": float(difference.mean()), "low": low, "high": high}


def rounded(value: float) -> float:
    """To five places, as far as rows can tell; what is too small for them to three figures."""
    return round(value, 5) if abs(value) >= SMALL else float(f"{value:.3g}")


def as_json(scores: Scores) -> dict[str, float | int]:
    """Plain values, rounded to what the data can tell; those of ordered classes beside the others."""
    values = asdict(scores)
    values |= values.pop("ordered", None) or {}
    return {name: value if isinstance(value, int) else rounded(value) for name, value in values.items()}
