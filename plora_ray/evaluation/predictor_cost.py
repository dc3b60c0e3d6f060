"""What a predictor costs: numbers learnt, bytes stored, seconds for one text alone. Knows rows and callables; no model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from plora_ray.evaluation.rows import EvaluationRows

WARM_UP_REQUESTS, REQUESTS = 3, 50


@dataclass(frozen=True)
class Size:
    """per_user: parameters that are one user's own. in_all: all that were learnt; the frozen model isn't counted. Stored as float32."""

    per_user: int
    in_all: int

    @property
    def stored_bytes(self) -> int:
        return 4 * self.in_all


@dataclass(frozen=True)
class PredictorCost:
    """seconds_per_request: median of texts that come one at a time, each by another user."""

    size: Size
    seconds_per_request: float

    def to_json(self) -> dict[str, Any]:
        return {
            "parameters_per_user": self.size.per_user,
            "parameters_in_all": self.size.in_all,
            "stored_bytes": self.size.stored_bytes,
            "seconds_per_request": round(self.seconds_per_request, 6),
        }


def seconds_per_request(answer: Callable[[int], object], rows: Sequence[int]) -> float:
    """Median time of `answer(row)` over up to REQUESTS rows, after a few that aren't counted. rows: one at least."""
    seconds = []
    for request in range(WARM_UP_REQUESTS + REQUESTS):
        began = time.perf_counter()
        answer(rows[request % len(rows)])
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds[WARM_UP_REQUESTS:]))


def sampled(rows: EvaluationRows) -> list[int]:
    """Test rows to ask for, of users in the generation if there are any: as many different users as possible."""
    known = np.flatnonzero(rows.known[rows.row_users])
    candidates = known if len(known) else np.arange(len(rows.row_users))
    _, firsts = np.unique(rows.row_users[candidates], return_index=True)
    return candidates[firsts][:REQUESTS].tolist()
