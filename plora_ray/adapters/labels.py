"""What a model's outputs mean: class names, or the scale of a regression. Kept with every generation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plora_ray.adapters.model import Task
from plora_ray.errors import DataError


@dataclass(frozen=True)
class Prediction:
    """label: class name, or the value of a regression. scores: probability by class name; empty for a regression."""

    label: str | float
    scores: dict[str, float]


@dataclass(frozen=True)
class LabelSpace:
    """classes: names in output order (empty for a regression). mean, std: a regression is learned standardised by these."""

    task: Task
    classes: tuple[str, ...] = ()
    mean: float = 0.0
    std: float = 1.0

    @property
    def outputs(self) -> int:
        """Logits a row: the number of classes, 1 for a regression."""
        return len(self.classes) if self.task == "classification" else 1

    @property
    def values(self) -> np.ndarray | None:
        """float64 [classes]: the classes as numbers, if they are three or more and all of them numbers, as stars are; else None."""
        try:
            values = np.array([float(name) for name in self.classes])
        except ValueError:
            return None
        return values if len(values) > 2 and np.isfinite(values).all() else None

    def to_json(self) -> dict[str, Any]:
        return {"task": self.task, "classes": list(self.classes), "mean": self.mean, "std": self.std}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> LabelSpace:
        return cls(values["task"], tuple(values["classes"]), float(values["mean"]), float(values["std"]))

    def encode(self, labels: Sequence[object] | np.ndarray) -> Tensor:
        """Class indices [rows] int64, or standardised values [rows] float32. Class labels are the names that data loading gives.

        Raises DataError for a label that isn't known.
        """
        if self.task == "regression":
            values = torch.tensor([_number(label) for label in labels], dtype=torch.float64)
            return ((values - self.mean) / self.std).float()
        index = {name: position for position, name in enumerate(self.classes)}
        unknown = next((str(label) for label in labels if str(label) not in index), None)
        if unknown is not None:
            raise DataError(self.not_one(unknown))
        return torch.tensor([index[str(label)] for label in labels], dtype=torch.int64)

    def not_one(self, label: str) -> str:
        """What is wrong with a label that no class is named by."""
        return f"label {label[:80]!r} is not one of this model's: {', '.join(self.classes[:20])}"

    def decode(self, logits: Tensor) -> list[Prediction]:
        """Predictions of logits [rows, outputs]; probabilities are softmax(logits)."""
        if self.task == "regression":
            return [Prediction(float(value), {}) for value in (logits[:, 0].double() * self.std + self.mean).tolist()]
        rows = torch.softmax(logits.double(), dim=-1).tolist()
        return [
            Prediction(self.classes[max(range(len(row)), key=row.__getitem__)], dict(zip(self.classes, row, strict=True))) for row in rows
        ]


def _number(label: object) -> float:
    try:
        value = float(label)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"label {str(label)[:80]!r} is not a finite number, which a regression needs")
    return value
