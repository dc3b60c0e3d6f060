"""What the waves' test rows say, added up wave by wave: memory grows with users (some numbers each), never with rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from plora_ray.adapters.labels import LabelSpace
from plora_ray.data.stats import PartitionStats
from plora_ray.evaluation.baselines import LabelHistory
from plora_ray.evaluation.comparison import LABEL_PRIOR, POPULATION, WITH_USER, Comparison, ComparisonTotals, Interval
from plora_ray.evaluation.metrics import Floats, Ints, as_json, log_softmax
from plora_ray.evaluation.user_gains import UserGains
from plora_ray.training.run_state import WaveOutcome

HABIT_STRENGTH = 2.0  # labels that everybody's habit weighs: the same whatever waves came before; evaluations find it from all users
REMAINING_EDGES = np.linspace(0, 1, 21)


@dataclass(frozen=True)
class RowBucket:
    """Users with `first` to `last` training rows, and what they gain over the population on their test rows, by metric."""

    first: int
    last: int
    users: int
    gains: dict[str, Interval]

    def to_json(self) -> dict[str, Any]:
        gains = {metric: gain.to_json() for metric, gain in self.gains.items()}
        return {"from": self.first, "to": self.last, "users": self.users, "gains": gains}


class WaveTotals:
    """Add every wave once, then read. stats: where everybody's label frequencies come from.

    users, examples: users fitted and their training rows. copied: users that came over unchanged. guarded: of the users fitted, those
    who are answered by the population since their fit would have harmed them.
    remaining_users: [20] users by share of the prior's variance left.
    """

    def __init__(self, labels: LabelSpace, stats: PartitionStats) -> None:
        self.users = self.examples = self.copied = self.guarded = 0
        self.remaining_users = np.zeros(len(REMAINING_EDGES) - 1, np.int64)
        self._remaining_sum = 0.0
        self._labels = labels
        self._overall = _label_frequencies(labels, stats)
        self._totals = ComparisonTotals(WITH_USER, labels.task, labels.outputs, labels.values)
        self._tested_examples: list[Ints] = []

    def add(self, outcome: WaveOutcome) -> None:
        """Count a wave."""
        self.users += len(outcome.examples)
        self.copied += len(outcome.copied)
        self.guarded += int(outcome.guarded.sum())
        self.examples += int(outcome.examples.sum(dtype=np.int64))
        told = np.clip(outcome.remaining[np.isfinite(outcome.remaining)], 0, 1)  # NaN where the solver knows none
        self.remaining_users += np.histogram(told, bins=REMAINING_EDGES)[0]
        self._remaining_sum += float(told.sum(dtype=np.float64))
        if len(outcome.labels):
            self._totals.add(self._predictions(outcome), self._in_units(outcome.labels), outcome.row_users)
            self._tested_examples.append(outcome.examples[np.unique(outcome.row_users)])

    @property
    def remaining(self) -> float | None:
        """Mean share of the prior's variance that is left, over users; None if no wave told."""
        told = int(self.remaining_users.sum())
        return self._remaining_sum / told if told else None

    @property
    def tested(self) -> bool:
        """Whether any user has test rows."""
        return bool(self._tested_examples)

    def comparison(self) -> Comparison | None:
        """With the user, without, and by the user's own labels; None without test rows."""
        return self._totals.result() if self.tested else None

    def user_gains(self) -> dict[str, UserGains]:
        """By metric, each tested user's gain over the population."""
        return self._totals.user_gains() if self.tested else {}

    def gain_by_training_rows(self) -> list[RowBucket]:
        """Tested users by 1, 2 to 3, 4 to 7, ... training rows."""
        if not self.tested:
            return []
        examples = np.concatenate(self._tested_examples)
        powers = np.frexp(examples)[1] - 1  # floor of log2
        buckets = []
        for power in np.unique(powers).tolist():
            users = np.flatnonzero(powers == power)
            buckets.append(RowBucket(2**power, 2 ** (power + 1) - 1, len(users), self._totals.gains_of(users)))
        return buckets

    def to_json(self, comparison: Comparison) -> dict[str, Any]:
        """The report's `test` section. comparison: what `comparison` gave."""
        names = {"accuracy": "accuracy_gain", "nll": "nll_gain", "mse": "squared_error_gain"}
        return {
            "with_user": as_json(comparison.predictors[WITH_USER].scores),
            "without_user": as_json(comparison.predictors[POPULATION].scores),
            "user_label_prior": as_json(comparison.predictors[LABEL_PRIOR].scores),
            **{names[metric]: gain.to_json() for metric, gain in comparison.gains[POPULATION].items()},
            "gain_over_user_label_prior": {metric: gain.to_json() for metric, gain in comparison.gains[LABEL_PRIOR].items()},
            "user_gains": {metric: gains.to_json() for metric, gains in self.user_gains().items()},
            "gain_by_training_rows": [bucket.to_json() for bucket in self.gain_by_training_rows()],
        }

    def _predictions(self, outcome: WaveOutcome) -> dict[str, Floats]:
        """By predictor, log-probabilities [rows, classes] or values [rows] in the label's units."""
        if self._labels.task == "classification":
            by_user: Floats = outcome.label_counts
            answers = {WITH_USER: log_softmax(outcome.personal), POPULATION: log_softmax(outcome.population)}
        else:
            by_user = np.column_stack([outcome.label_counts[:, 0], outcome.examples])
            answers = {WITH_USER: self._in_units(outcome.personal[:, 0]), POPULATION: self._in_units(outcome.population[:, 0])}
        history = LabelHistory(self._labels.task, by_user, self._overall, self.examples, HABIT_STRENGTH)
        prior = history.label_prior(outcome.row_users)
        return {**answers, LABEL_PRIOR: prior if self._labels.task == "classification" else self._in_units(prior)}

    def _in_units(self, values: np.ndarray) -> np.ndarray:
        """A regression's standardised values in the label's units; class indices as they are."""
        return values if self._labels.task == "classification" else values * self._labels.std + self._labels.mean


def _label_frequencies(labels: LabelSpace, stats: PartitionStats) -> Floats:
    """Of all training rows: [classes] frequencies, or [1] the mean of standardised labels, which is 0."""
    if labels.task == "regression":
        return np.zeros(1)
    counts = np.array([stats.label_counts["train"].get(name, 0) for name in labels.classes], np.float64)
    frequencies: Floats = counts / counts.sum()
    return frequencies
