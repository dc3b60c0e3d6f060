"""How sure a trained baseline may be: what the job does to a generation between its stages, done to a rival.

Of people whom it was fitted on a rival may be surer than of people whom it has never met, so each has a scale of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plora_ray.adapters.calibration import Calibration, best_scale, log_frequencies, scale_losses
from plora_ray.adapters.labels import LabelSpace
from plora_ray.evaluation.labelled import LabelledTexts
from plora_ray.evaluation.metrics import Ints
from plora_ray.evaluation.rivals.rival import Rival, strangers


def frequencies_of(rows: LabelledTexts, labels: LabelSpace) -> tuple[float, ...]:
    """Log frequencies by class, which calibrated logits are drawn towards."""
    return log_frequencies(torch.bincount(labels.encode(list(rows.labels)), minlength=labels.outputs).tolist())


def losses_by_scale(rival: Rival, users: Ints, held_out: LabelledTexts, labels: LabelSpace, base: Sequence[float]) -> Tensor:
    """[len(SCALES)] sums of the negative log-likelihood of rows, as `users` [rows] read them."""
    return scale_losses(torch.from_numpy(rival.logits(users, held_out.texts)), labels.encode(list(held_out.labels)), base)


@dataclass(frozen=True)
class RivalCalibration:
    """known: of answers for users in the training rows. new: of those for anybody else."""

    known: Calibration
    new: Calibration

    @classmethod
    def of(cls, rival: Rival, labels: LabelSpace, learnt: LabelledTexts, held_out: LabelledTexts) -> RivalCalibration:
        """By `held_out` rows of users from whose other rows the rival has `learnt`: as their own, and as if strangers had written them."""
        base = frequencies_of(learnt, labels)
        known, new = (losses_by_scale(rival, users, held_out, labels, base) for users in (held_out.users, strangers(held_out.users)))
        return cls(Calibration(best_scale(known), base), Calibration(best_scale(new), base))

    def at(self, examples: int | None) -> Calibration:
        """The one for users of whom so many examples are known; None: users in the training rows."""
        return self.known if examples is None else self.new
