"""Figures of merit from labels and logits, over rows and over users, with bootstrap intervals. Pure numpy and scikit-learn."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import f1_score

Floats = NDArray[np.floating]
Ints = NDArray[np.integer]

BOOTSTRAP_ROUNDS = 1000
BOOTSTRAP_DRAWS_AT_ONCE = 4_000_000  # of users: bounds the index arrays to some tens of megabytes


@dataclass(frozen=True)
class ClassificationScores:
    """accuracy, macro_f1 (over the classes present), nll (mean negative log-likelihood, nats) over `rows` rows."""

    rows: int
    accuracy: float
    macro_f1: float
    nll: float


@dataclass(frozen=True)
class RegressionScores:
    """Mean squared and mean absolute error, and R squared against the mean, in units of the label, over `rows` rows."""

    rows: int
    mse: float
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


def classification_scores(log_probabilities: Floats, labels: Ints) -> ClassificationScores:
    """Scores of log-probabilities [rows, classes] against class indices [rows]; needs at least one row."""
    chosen = log_probabilities.argmax(axis=1)
    return ClassificationScores(
        rows=len(labels),
        accuracy=float((chosen == labels).mean()),
        macro_f1=float(f1_score(labels, chosen, average="macro", labels=np.unique(labels), zero_division=0)),
        nll=float(row_nll(log_probabilities, labels).mean()),
    )


def regression_scores(predicted: Floats, labels: Floats) -> RegressionScores:
    """Scores of predictions [rows] against values [rows]; needs at least one row."""
    error = predicted - labels
    variance = float(labels.var())
    mse = float((error**2).mean())
    return RegressionScores(len(labels), mse, float(np.abs(error).mean()), 1 - mse / variance if variance else 0.0)


def bootstrap_by_user(values: Floats, users: Ints, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of `values` [rows] when whole users [rows] are drawn with replacement."""
    _, index = np.unique(users, return_inverse=True)
    count = int(index.max()) + 1
    sums, rows = np.bincount(index, weights=values, minlength=count), np.bincount(index, minlength=count)
    generator = np.random.default_rng(seed)
    means: list[Floats] = []
    while (left := BOOTSTRAP_ROUNDS - sum(map(len, means))) > 0:
        drawn = generator.integers(0, count, (min(left, max(1, BOOTSTRAP_DRAWS_AT_ONCE // count)), count))
        means.append(sums[drawn].sum(axis=1) / rows[drawn].sum(axis=1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)


def means_by_user(values: Floats, users: Ints) -> Floats:
    """The mean of `values` [rows] of each user that occurs in `users` [rows], in ascending order of users."""
    _, index = np.unique(users, return_inverse=True)
    means: Floats = np.bincount(index, weights=values) / np.bincount(index)
    return means


def label_prior_log_probabilities(label_counts: Floats, users: Ints, population: Floats, strength: float = 2.0) -> Floats:
    """The baseline that never reads the text: log-probabilities [rows, classes] of each row's user from his own past labels.

    label_counts: [users, classes]; population: [classes] frequencies, added with the weight of `strength` labels.
    """
    smoothed = label_counts + strength * population
    log_probabilities: Floats = np.log(np.maximum(smoothed / smoothed.sum(axis=1, keepdims=True), 1e-12))
    return log_probabilities[users]


def paired(better: Floats, worse: Floats, users: Ints, seed: int = 0) -> dict[str, float]:
    """Mean of worse - better per row (a gain when losses are given) with its 95 % interval, bootstrapped by user."""
    difference = worse - better
    low, high = bootstrap_by_user(difference, users, seed)
    return {"mean": float(difference.mean()), "low": low, "high": high}


def as_json(scores: Scores) -> dict[str, float | int]:
    """Plain values, rounded to what the data can tell."""
    return {name: value if isinstance(value, int) else round(value, 5) for name, value in asdict(scores).items()}
