"""Calibration of the population between the two stages: how large logits may be, by validation rows of all ranks.

What users are fitted to is then what the population gets wrong, and not how sure it is of it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from plora_ray.adapters.calibration import Calibration, best_scale, log_frequencies, scale_losses
from plora_ray.training.passes import FrozenPasses
from plora_ray.training.rank_rows import RankRows

MOST_ROWS = 8192  # validation rows a rank looks at


def calibrate(passes: FrozenPasses, rows: RankRows, average: Tensor | None = None) -> Calibration:
    """Of a classification's logits; without validation rows the scale is 1. All ranks must call.

    average: vector [user_dim] of the average user, as whom the population will answer; None where there are no vectors.
    """
    counts = torch.bincount(rows.labels[rows.of_split("train")], minlength=passes.outputs).double()
    dist.all_reduce(counts)
    base = log_frequencies(counts.tolist())
    chosen = rows.of_split("validation")[:MOST_ROWS]  # rows lie by users' keys, and so at random
    nobody = torch.zeros(len(chosen), dtype=torch.int64)
    logits = passes.population_logits(chosen) if average is None else passes.user_logits(chosen, average[None].float(), nobody)
    losses = scale_losses(logits, rows.labels[chosen], base)
    dist.all_reduce(losses)
    return Calibration(best_scale(losses), base)
