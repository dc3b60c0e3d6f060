"""How sure a trained baseline may be: what the job does to a generation between its stages, done to a rival.

Of people whom it was fitted on a rival may be surer than of people whom it has never met, so each has a scale of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from plora_ray.adapters.calibration import Calibration, best_scale, log_frequencies, scale_losses
from plora_ray.adapters.labels import LabelSpace
from plora_ray.evaluation.labelled import LabelledTexts
from plora_ray.evaluation.metrics import Ints
from plora_ray.evaluation.rivals.rival import Rival, strangers


@dataclass(frozen=True)
class RivalCalibration:
    """known: of answers for users in the training rows. new: of those for anybody else."""

    known: Calibration
    new: Calibration

    @classmethod
    def of(cls, rival: Rival, labels: LabelSpace, learnt: LabelledTexts, held_out: LabelledTexts) -> RivalCalibration:
        """By `held_out` rows of users from whose other rows the rival has `learnt`: as their own, and as if strangers had written them."""
        base = log_frequencies(torch.bincount(labels.encode(list(learnt.labels)), minlength=labels.outputs).tolist())
        targets = labels.encode(list(held_out.labels))

        def best(users: Ints) -> Calibration:
            logits = torch.from_numpy(rival.logits(users, held_out.texts))
            return Calibration(best_scale(scale_losses(logits, targets, base)), base)

        return cls(best(held_out.users), best(strangers(held_out.users)))

    def at(self, examples: int | None) -> Calibration:
        """The one for users of whom so many examples are known; None: users in the training rows."""
        return self.known if examples is None else self.new
