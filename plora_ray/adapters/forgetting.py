"""How rows grow old: what a user said years ago tells less of what he will say tomorrow than what he said last week.

    w = 2^(-age / half_life)        counted from the newest rows when it was chosen

Each row's loss counts w in the objective of its user's fit (`problem.py`): exponential forgetting, as recommenders and adaptive filters
do it (Haykin 2002; Ding and Li 2005). One half-life for all users; `lasting.py` chooses it, or none, on rows that came later.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Times = NDArray[np.datetime64]


def days_of(times: Times) -> NDArray[np.float64]:
    """[rows], days since 1970 in UTC; NaN for NaT, which is a row that nobody dated."""
    return (times - np.datetime64(0, "us")) / np.timedelta64(1, "D")


@dataclass(frozen=True)
class Forgetting:
    """half_life: days, above zero. newest: day (since 1970, UTC) whose rows count in full, as do later ones and those without a date.

    lasting: what `UserPrior.lasting` is where rows count so.
    """

    half_life: float
    newest: float
    lasting: float = 1.0

    def weights(self, times: Times) -> Tensor:
        """[rows] in [0, 1], float64: what rows of these times count."""
        ages = np.clip(self.newest - days_of(times), 0.0, None)
        return torch.from_numpy(np.exp2(-np.nan_to_num(ages) / self.half_life))

    def tensors(self) -> dict[str, Tensor]:
        """As named tensors, to be kept with the prior."""
        return {f"prior.dated.{name}": torch.tensor([number], dtype=torch.float64) for name, number in vars(self).items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Forgetting | None:
        """What `tensors` were made from, other names ignored; None if it isn't among them."""
        if "prior.dated.half_life" not in tensors:
            return None
        return cls(**{field.name: float(tensors[f"prior.dated.{field.name}"]) for field in fields(cls)})
