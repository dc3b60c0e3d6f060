"""Predictors that never read a text: what everybody answers, and what this user answered before.

Beating the first shows that the model reads; beating the second shows that an adapter is more than a habit. Pure numpy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from plora_ray.adapters.model import Task
from plora_ray.evaluation.metrics import Floats, Ints, label_prior_log_probabilities

PRIOR_STRENGTH = 2.0  # labels that everybody's habit weighs against the user's own


@dataclass(frozen=True)
class LabelHistory:
    """Labels of training rows.

    by_user: [users, classes] counts, or [users, 2] sum and number of a regression's labels. overall: [classes] frequencies
    of all users (one label of each class added, so that none is impossible), or [1] their mean. rows: how many labels.
    """

    task: Task
    by_user: Floats
    overall: Floats
    rows: int

    @classmethod
    def of(cls, users_of: Ints, labels: NDArray[np.number], counts: Ints, *, users: int, outputs: int, task: Task) -> LabelHistory:
        """The history of label `labels[i]` given `counts[i]` times by user `users_of[i]` in 0..users-1."""
        if task == "regression":
            sums, numbers = (np.bincount(users_of, weights=values, minlength=users) for values in (labels * counts, counts))
            return cls(task, np.stack([sums, numbers], axis=1), np.array([sums.sum() / max(numbers.sum(), 1)]), int(counts.sum()))
        flat = np.bincount(users_of * outputs + labels.astype(np.int64), weights=counts, minlength=users * outputs)
        by_user = flat.reshape(users, outputs).astype(np.float64)
        total = by_user.sum(axis=0) + 1
        return cls(task, by_user, total / total.sum(), int(counts.sum()))

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
        if self.task == "classification":
            return label_prior_log_probabilities(self.by_user, row_users, self.overall, PRIOR_STRENGTH)
        sums, numbers = self.by_user[row_users].T
        means: Floats = (sums + PRIOR_STRENGTH * self.overall[0]) / (numbers + PRIOR_STRENGTH)
        return means
