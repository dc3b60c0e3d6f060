"""Test rows by age: the test's time in equal parts, and what the gain does from one to the next. Knows times and comparisons only."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from plora_ray.evaluation.comparison import POPULATION, Comparison
from plora_ray.evaluation.metrics import Ints

PARTS = 4


def in_parts(times: NDArray[np.datetime64]) -> tuple[list[str], Ints]:
    """Names of PARTS equally long parts of the time that `times` [rows] cover, one row at least, and each row's part [rows].

    A part is named by its first and last minute, or days where parts last a day or longer; names sort by time.
    """
    first, last = times.min(), times.max()
    length = (last - first) / PARTS
    unit = "datetime64[D]" if length >= np.timedelta64(1, "D") else "datetime64[m]"
    bounds = [str((first + length * part).astype(unit)) for part in range(PARTS + 1)]
    names = [f"{part + 1} of {PARTS}: {bounds[part]} to {bounds[part + 1]}" for part in range(PARTS)]
    past = (times - first) / np.maximum(length, np.timedelta64(1, "us"))
    return names, np.minimum(past.astype(np.int64), PARTS - 1)


def drift(periods: Mapping[str, Comparison]) -> str | None:
    """A sentence on the gain in the first and the last part that have rows; None where fewer than two have."""
    if len(periods) < 2:
        return None
    first, last = (periods[name] for name in (min(periods), max(periods)))
    early, late = (part.gains[POPULATION][part.loss] for part in (first, last))
    loss = {"nll": "negative log-likelihood", "mse": "squared error"}[first.loss]
    return (
        f"The gain in {loss} is {early.mean:.4f} ({early.low:.4f} to {early.high:.4f}) soon after training and {late.mean:.4f} "
        f"({late.low:.4f} to {late.high:.4f}) at the end of the test's time"
    )
