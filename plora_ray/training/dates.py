"""When the rows of all ranks are from, told in a way that a few wrong dates don't change."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

from plora_ray.adapters.forgetting import Times, days_of

PERCENTILES = np.linspace(0.0, 1.0, 101)
NEWEST = 0.99  # of the rows are older than what counts as the newest: 9999-12-31 is what some write for "no date"


def newest_and_typical_age(times: Times) -> tuple[float, float]:
    """The newest day (since 1970, UTC) of all ranks' rows but the last hundredth, and the median age there, in days; all ranks must call.

    times: [rows] of this rank; those without a date tell nothing. Zeros if no row has one.
    """
    days = days_of(times)
    days = days[~np.isnan(days)]
    own = torch.zeros(1 + len(PERCENTILES), dtype=torch.float64)
    if len(days):
        own[0], own[1:] = len(days), torch.from_numpy(np.quantile(days, PERCENTILES, method="nearest"))
    ranks = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(ranks, own)
    counts, points = torch.stack(ranks)[:, 0], torch.stack(ranks)[:, 1:]
    if not counts.any():
        return 0.0, 0.0
    order = points.flatten().argsort()
    below = counts.repeat_interleave(len(PERCENTILES))[order].cumsum(0)
    newest, median = (float(points.flatten()[order][int(torch.searchsorted(below, share * below[-1]))]) for share in (NEWEST, 0.5))
    return newest, newest - median
