"""Calibration of the population between the two stages: how large logits may be, by validation rows of all ranks.

What users are fitted to is then what the population gets wrong, and not how sure it is of it.
"""

from __future__ import annotations

import torch.distributed as dist

from plora_ray.adapters.calibration import best_scale, scale_losses
from plora_ray.training.passes import FrozenPasses
from plora_ray.training.rank_rows import RankRows

MOST_ROWS = 8192  # validation rows a rank looks at


def find_scale(passes: FrozenPasses, rows: RankRows) -> float:
    """What the logits of a classification are to be multiplied by; 1 where there are no validation rows. All ranks must call."""
    chosen = rows.of_split("validation")[:MOST_ROWS]  # rows lie by users' keys, and so at random
    losses = scale_losses(passes.population_logits(chosen), rows.labels[chosen])
    dist.all_reduce(losses)
    return best_scale(losses)
