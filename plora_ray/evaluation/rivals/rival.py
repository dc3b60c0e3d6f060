"""What a trained baseline is to the evaluation, and what it is made from. Knows texts, labels and users as numbers; no files or metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from plora_ray.adapters.labels import LabelSpace
from plora_ray.adapters.model import AdapterSpec
from plora_ray.config import Settings
from plora_ray.evaluation.labelled import LabelledTexts
from plora_ray.evaluation.metrics import Ints
from plora_ray.evaluation.predictor_cost import Size
from plora_ray.evaluation.rivals.course import Course

Advance = Callable[[int], None]  # so many more rows have gone through a model


def strangers(users: Ints) -> Ints:
    """For each user number that of somebody whom nobody has met, a different one for each; for those it gives the users again."""
    return -1 - users


@dataclass(frozen=True)
class RivalSetup:
    """What rivals have in common with the generation they are compared to.

    encode: texts to token ids. ordinary_tokens: ids of the tokens that aren't special; leading: how many special tokens a text
    begins with. longest: tokens that the model can read at once. keys: by user number, a stable key without the user's name.
    validation: rows of the same users that nothing is learnt from, to calibrate by. rate_factor: what rivals with a learning rate of
    their own multiply it by; the course's has been.
    """

    settings: Settings
    spec: AdapterSpec
    labels: LabelSpace
    course: Course
    device: torch.device
    encode: Callable[[Sequence[str]], list[list[int]]]
    pad_id: int
    ordinary_tokens: Ints
    leading: int
    longest: int
    keys: Sequence[bytes]
    validation: LabelledTexts
    rate_factor: float = 1.0

    def at(self, factor: float) -> RivalSetup:
        """The same at `factor` times the learning rate."""
        course = replace(self.course, learning_rate=self.course.learning_rate * factor)
        return replace(self, course=course, rate_factor=self.rate_factor * factor)

    def targets(self, rows: LabelledTexts) -> Tensor:
        """Class indices or standardised values [rows]."""
        return self.labels.encode(list(rows.labels)).to(self.device)


class Rival(Protocol):
    """A trained baseline. Users whom it has neither been fitted on nor met get its population's answer."""

    def fit(self, rows: LabelledTexts, advance: Advance) -> None:
        """Learn from all training rows."""

    def meet(self, rows: LabelledTexts, advance: Advance) -> None:
        """Learn what can be learnt of new users from a few rows each, and forget the new users met before."""

    def logits(self, users: Ints, texts: Sequence[str]) -> NDArray[np.float32]:
        """[rows, outputs] for text i as user `users[i]` reads it; a number below zero is a stranger's."""

    def size(self) -> Size:
        """Of what `fit` has learnt."""
