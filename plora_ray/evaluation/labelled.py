"""Rows that something is to learn from. Knows users as numbers, texts and labels as data files give them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from plora_ray.evaluation.metrics import Ints


@dataclass(frozen=True)
class LabelledTexts:
    """users: [rows] the users' numbers. labels: class names, or values of a regression in their own units."""

    users: Ints
    texts: Sequence[str]
    labels: Sequence[str | float]

    @classmethod
    def of_rows(cls, rows: Sequence[tuple[int, str, str | float]]) -> LabelledTexts:
        """Of (user, text, label)."""
        return cls(np.array([user for user, *_ in rows], np.int64), [text for _, text, _ in rows], [label for *_, label in rows])

    def of(self, user: int) -> LabelledTexts:
        """The rows of one user."""
        places = np.flatnonzero(self.users == user).tolist()
        return LabelledTexts(self.users[places], [self.texts[place] for place in places], [self.labels[place] for place in places])
