"""What errors cost: a matrix of costs, the decision that expects the least, and what decisions cost on labelled rows. Pure numpy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from plora_ray.adapters.labels import LabelSpace
from plora_ray.errors import ConfigError
from plora_ray.evaluation.metrics import Floats, Ints

COST, COST_OF_LIKELIEST = "cost", "cost_of_likeliest"


@dataclass(frozen=True, eq=False)
class Costs:
    """matrix: [classes, classes] of answering the class of the column where that of the row is right."""

    matrix: NDArray[np.float64]

    @classmethod
    def of(cls, given: Mapping[str, Mapping[str, float]], labels: LabelSpace) -> Costs:
        """`evaluation.cost_matrix` over a generation's classes. Raises ConfigError that names what is missing or unknown."""
        where, classes = "evaluation.cost_matrix", labels.classes
        named = {*given, *(answer for costs in given.values() for answer in costs)}
        if unknown := sorted(named - set(classes)):
            raise ConfigError(f"{where} names {unknown[0]!r}, which is no class of this generation: {', '.join(classes)}")
        matrix = np.zeros((len(classes), len(classes)))
        for row, label in enumerate(classes):
            for column, answer in enumerate(classes):
                cost = given.get(label, {}).get(answer, 0.0 if row == column else None)
                if cost is None:
                    raise ConfigError(f"{where} has no cost of answering {answer!r} where {label!r} is right: add {where}.{label}.{answer}")
                matrix[row, column] = cost
        return cls(matrix)

    def cheapest(self, log_probabilities: Floats) -> Ints:
        """[rows] the class whose expected cost under the probabilities [rows, classes] is least; of equal ones the first."""
        decided: Ints = (np.exp(log_probabilities) @ self.matrix).argmin(axis=1)
        return decided

    def of_rows(self, log_probabilities: Floats, labels: Ints) -> dict[str, Floats]:
        """By metric, what every row [rows] costs: deciding by expected cost, and by answering the likeliest class."""
        return {
            COST: self.matrix[labels, self.cheapest(log_probabilities)],
            COST_OF_LIKELIEST: self.matrix[labels, log_probabilities.argmax(axis=1)],
        }
