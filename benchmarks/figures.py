"""A measured figure, and the fair way to measure a ratio: both sides in one run, alternating."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class Figure:
    """value with a spread from low to high, and the goal it is measured against (None: there is none, it only informs)."""

    figure: str
    value: float
    low: float
    high: float
    unit: str
    goal: float | None

    def emit(self, as_json: bool) -> None:
        """Print it as a line of JSON or for people."""
        goal = "" if self.goal is None else f", goal {self.goal}"
        text = json.dumps(asdict(self)) if as_json else f"{self.figure}: {self.value} {self.unit} ({self.low} to {self.high}{goal})"
        print(text, flush=True)


def spread(name: str, values: list[float], *, unit: str, goal: float | None) -> Figure:
    """The median of repeated measurements with their 10th and 90th percentile."""
    low, value, high = np.percentile(values, [10, 50, 90])
    return Figure(name, round(float(value), 4), round(float(low), 4), round(float(high), 4), unit, goal)


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def speed_ratio(name: str, ours: Callable[[], object], theirs: Callable[[], object], *, rounds: int, goal: float) -> Figure:
    """How many times as fast `ours` is: seconds of theirs / seconds of ours, in alternating rounds after a warm-up."""
    ours(), theirs()
    ratios = []
    for turn in range(rounds):
        taken = {side: seconds(side) for side in ((ours, theirs) if turn % 2 else (theirs, ours))}
        ratios.append(taken[theirs] / taken[ours])
    return spread(name, ratios, unit="ratio", goal=goal)
