"""Who gains and who loses: each user's own gain over the population, and which of them are more than chance.

Pure numpy: knows sums over users' rows; doesn't know users, texts or predictors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from plora_ray.evaluation.metrics import Floats, Ints, rounded

HISTOGRAM_BINS = 30
FEWEST_ROWS = 5  # of a user: below it a gain's own noise can't be told
SAME = 1e-9  # of a squared gain: less is rounding
CHANCE = 0.025  # of a user whom the adapter does nothing to be beyond noise, on either side, were gains normal


@dataclass(frozen=True, eq=False)
class UserGains:
    """means: [users] mean gain a row, positive is better. noise: [users] how large a mean of the user's rows is by CHANCE, by Student's
    law for so many rows; NaN where it can't be told: below FEWEST_ROWS, and where all rows gain the same, unless it is nothing."""

    means: Floats
    noise: Floats

    @classmethod
    def of(cls, sums: Floats, squares: Floats, rows: Ints) -> UserGains:
        """sums, squares: [users] of the gains of each user's rows; rows: [users] how many they are, one at least."""
        means = sums / rows
        variance = np.maximum(squares / rows - means**2, 0) * rows / np.maximum(rows - 1, 1)
        different, places = np.unique(rows, return_inverse=True)
        errors_allowed = stats.t.isf(CHANCE, np.maximum(different - 1, 1))[places]
        told = (rows >= FEWEST_ROWS) & ((variance > SAME * means**2) | (means == 0))
        return cls(means, np.where(told, errors_allowed * np.sqrt(variance / rows), np.nan))

    @property
    def judged(self) -> int:
        """Users with rows enough to tell a gain from noise."""
        return int(np.isfinite(self.noise).sum())

    @property
    def helped(self) -> float:
        """Share of the judged users who gain beyond noise; NaN if nobody can be judged."""
        return self._share(self.means > self.noise)

    @property
    def harmed(self) -> float:
        """Share of the judged users who lose beyond noise; NaN if nobody can be judged."""
        return self._share(self.means < -self.noise)

    def _share(self, which: NDArray[np.bool_]) -> float:
        return float(which.sum()) / self.judged if self.judged else math.nan

    @property
    def worst_decile(self) -> float:
        """Mean gain of the tenth of the users who gain least; one user at least."""
        lowest = np.sort(self.means)[: max(1, len(self.means) // 10)]
        return float(lowest.mean())

    def to_json(self) -> dict[str, Any]:
        """Plain values: a histogram of the means, and the shares."""
        counts, edges = np.histogram(self.means, bins=HISTOGRAM_BINS)
        shares = {
            "share_better": float((self.means > 0).mean()), "share_helped": self.helped, "share_harmed": self.harmed,
            "worst_decile": self.worst_decile,
        }  # fmt: skip
        return {
            "edges": [rounded(float(edge)) for edge in edges],
            "users": counts.tolist(),
            "users_judged": self.judged,
            **{name: None if math.isnan(value) else rounded(value) for name, value in shares.items()},
        }
