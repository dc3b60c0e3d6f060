"""Predictors that never read a text: what everybody answers, and what this user answered before.

Beating the first shows that the model reads; beating the second shows that an adapter is more than a habit. Pure numpy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

from plora_ray.adapters.model import Task
from plora_ray.evaluation.metrics import Floats, Ints

STRENGTHS = np.geomspace(1000.0, 0.1, 60)  # labels that everybody's habit may weigh; the largest first: it is taken where none is better
MOST_USERS = 10_000  # whose labels tell how much everybody's habit weighs


@dataclass(frozen=True)
class LabelHistory:
    """Labels of training rows.

    by_user: [users, classes] counts, or [users, 2] sum and number of a regression's labels. overall: [classes] frequencies
    of all users (one label of each class added, so that none is impossible), or [1] their mean. rows: how many labels.
    strength: how many of a user's own labels everybody's habit weighs; that under which the users' labels are likeliest.
    """

    task: Task
    by_user: Floats
    overall: Floats
    rows: int
    strength: float

    @classmethod
    def of(cls, users_of: Ints, labels: NDArray[np.number], counts: Ints, *, users: int, outputs: int, task: Task) -> LabelHistory:
        """The history of label `labels[i]` given `counts[i]` times by user `users_of[i]` in 0..users-1."""
        if task == "regression":
            sums, numbers = (np.bincount(users_of, weights=values, minlength=users) for values in (labels * counts, counts))
            mean = sums.sum() / max(numbers.sum(), 1)
            variance = float(((labels - mean) ** 2 * counts).sum() / max(numbers.sum(), 1))
            return cls.of_totals(task, np.stack([sums, numbers], axis=1), np.array([mean]), int(counts.sum()), variance)
        flat = np.bincount(users_of * outputs + labels.astype(np.int64), weights=counts, minlength=users * outputs)
        by_user = flat.reshape(users, outputs).astype(np.float64)
        total = by_user.sum(axis=0) + 1
        return cls.of_totals(task, by_user, total / total.sum(), int(counts.sum()))

    @classmethod
    def of_totals(cls, task: Task, by_user: Floats, overall: Floats, rows: int, variance: float = 1.0) -> LabelHistory:
        """The history that has these totals. variance: of all labels of a regression."""
        some = by_user[(by_user if task == "classification" else by_user[:, 1:]).any(axis=1)][:MOST_USERS]
        evidence = _class_evidence(some, overall) if task == "classification" else _mean_evidence(some, overall[0], variance)
        return cls(task, by_user, overall, rows, float(STRENGTHS[np.argmax(evidence)]))

    def restricted_to(self, users_of: Ints, labels: NDArray[np.number]) -> LabelHistory:
        """The same view of everybody, but of single users only the given labels: what is known of somebody new."""
        ones = np.ones(len(users_of), np.int64)
        outputs = 1 if self.task == "regression" else self.by_user.shape[1]
        own = LabelHistory.of(users_of, labels, ones, users=len(self.by_user), outputs=outputs, task=self.task)
        return replace(self, by_user=own.by_user)

    def majority(self, row_users: Ints) -> Floats:
        """Everybody's labels for every row: log-probabilities [rows, classes], or the mean [rows]."""
        if self.task == "regression":
            return np.full(len(row_users), self.overall[0])
        return np.tile(np.log(self.overall), (len(row_users), 1))

    def label_prior(self, row_users: Ints) -> Floats:
        """The user's own labels, drawn towards everybody's: log-probabilities [rows, classes], or a mean [rows]."""
        own = self.by_user[row_users]
        if self.task == "classification":
            smoothed = own + self.strength * self.overall
            log_probabilities: Floats = np.log(np.maximum(smoothed / smoothed.sum(axis=1, keepdims=True), 1e-12))
            return log_probabilities
        sums, numbers = own.T
        means: Floats = (sums + self.strength * self.overall[0]) / (numbers + self.strength)
        return means


def _class_evidence(counts: Floats, overall: Floats) -> Floats:
    """[strengths] log-likelihood of counts [users, classes] when each user's habit is drawn from a Dirichlet around everybody's."""
    rows, evidence = counts.sum(axis=1), np.zeros(len(STRENGTHS))
    for place, strength in enumerate(STRENGTHS):
        around = strength * np.maximum(overall, 1e-12)
        users = gammaln(strength) - gammaln(strength + rows) + (gammaln(around + counts) - gammaln(around)).sum(axis=1)
        evidence[place] = users.sum()
    return np.round(evidence, 6)


def _mean_evidence(totals: Floats, mean: float, variance: float) -> Floats:
    """[strengths] log-likelihood of users' means, when each is drawn around everybody's. totals: [users, 2] sums and numbers of labels."""
    sums, numbers = totals[totals[:, 1] > 0].T
    between = max(variance, 1e-12) / (1 + STRENGTHS[:, None])  # what users differ by; their own labels differ by `strength` times that
    spread = between + between * STRENGTHS[:, None] / numbers
    evidence: Floats = -0.5 * (np.log(spread) + (sums / numbers - mean) ** 2 / spread).sum(axis=1)
    return np.round(evidence, 6)
