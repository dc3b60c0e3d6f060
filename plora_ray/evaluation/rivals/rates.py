"""A baseline at the learning rate that suits it: trained at several, and validation rows choose. Our own method isn't given that."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from plora_ray.adapters.objective import task_losses
from plora_ray.errors import ConfigError, ModelError
from plora_ray.evaluation.labelled import LabelledTexts
from plora_ray.evaluation.metrics import Ints
from plora_ray.evaluation.predictor_cost import Size
from plora_ray.evaluation.rivals.calibrations import frequencies_of, losses_by_scale
from plora_ray.evaluation.rivals.rival import Advance, Rival, RivalSetup


@dataclass(frozen=True)
class TriedRates:
    """losses: by factor on the rate, the mean loss on validation rows: NLL in nats, at the best scale where rivals are calibrated; of a
    regression the objective's; infinite where the training diverged.
    """

    losses: Mapping[float, float]

    @property
    def taken(self) -> float:
        return min(self.losses, key=self.losses.__getitem__)

    def to_json(self) -> dict[str, Any]:
        losses = {f"{factor:g}": loss if math.isfinite(loss) else None for factor, loss in self.losses.items()}
        return {"taken": self.taken, "validation_loss": losses}


class BestRate:
    """The rival, of those that `build` makes of a setup at each of `factors`, with the lowest loss on validation rows.

    Raises ConfigError if there are no validation rows, ModelError (in `fit`) if every training diverged.
    """

    def __init__(self, build: Callable[[RivalSetup], Rival], setup: RivalSetup, factors: Sequence[float]) -> None:
        """Builds the first, so that one that can't be built is told before anything is trained."""
        if not len(setup.validation.users):
            raise ConfigError("evaluation.baseline_rates has several, and there are no validation rows to choose by: name one, or add rows")
        self._build, self._setup, self._factors = build, setup, factors
        self._first: Rival | None = build(setup.at(factors[0]))
        self._best: Rival | None = None
        self.tried = TriedRates({})

    def fit(self, rows: LabelledTexts, advance: Advance) -> None:
        for factor in self._factors:
            rival, self._first = self._first or self._build(self._setup.at(factor)), None
            self.tried = TriedRates({**self.tried.losses, factor: self._loss_after_fit(rival, rows, advance)})
            if self.tried.taken == factor:
                self._best = rival
        if math.isinf(self.tried.losses[self.tried.taken]):
            raise ModelError("a baseline's training diverged at each of evaluation.baseline_rates: add a lower one")

    def meet(self, rows: LabelledTexts, advance: Advance) -> None:
        self._chosen.meet(rows, advance)

    def logits(self, users: Ints, texts: Sequence[str]) -> NDArray[np.float32]:
        return self._chosen.logits(users, texts)

    def size(self) -> Size:
        return self._chosen.size()

    @property
    def _chosen(self) -> Rival:
        assert self._best is not None, "fit() comes first"
        return self._best

    def _loss_after_fit(self, rival: Rival, learnt: LabelledTexts, advance: Advance) -> float:
        setup, held_out = self._setup, self._setup.validation
        try:
            rival.fit(learnt, advance)
        except ModelError:  # too fast for it
            return math.inf
        if setup.settings.training.calibrate and setup.labels.task == "classification":
            base = frequencies_of(learnt, setup.labels)
            loss = float(losses_by_scale(rival, held_out.users, held_out, setup.labels, base).min()) / len(held_out.texts)
        else:
            logits = torch.from_numpy(rival.logits(held_out.users, held_out.texts))
            loss = float(task_losses(logits, setup.targets(held_out).cpu(), setup.labels.task).mean())
        return loss if math.isfinite(loss) else math.inf
