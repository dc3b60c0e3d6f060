"""The numbers that every sink gets, and how they come from snapshots of the board."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from plora_ray.training.progress import Snapshot

RATE_WINDOW_S = 10.0


@dataclass(frozen=True)
class Sample:
    """The job at one moment. seconds: of training so far, over all starts, pauses between them left out.

    step, loss, learning_rate: of the population stage; None in samples of the user stage. rows: gone through so far, over all
    starts. Rates: over the last ten seconds.
    """

    seconds: float
    rows: int
    rows_per_s: float
    users_done: int
    users_per_s: float
    step: int | None = None
    loss: float | None = None
    learning_rate: float | None = None


class Meter:
    """Turns snapshots into samples. seconds, rows: where the starts before this one ended; users: finished by them."""

    def __init__(self, seconds: float = 0.0, rows: int = 0, users: int = 0) -> None:
        self._seconds, self._rows = seconds, rows
        self._window: deque[tuple[float, int, int]] = deque([(0.0, 0, users)])
        self.points_seen = 0

    def read(self, snapshot: Snapshot, elapsed_s: float) -> list[Sample]:
        """What is new `elapsed_s` after this start: a sample for every new point, or one if users were finished."""
        new = snapshot.points[max(0, self.points_seen - snapshot.points_before) :]
        moved = snapshot.users_done != self._window[-1][2]
        self.points_seen = snapshot.points_before + len(snapshot.points)
        self._window.append((elapsed_s, snapshot.rows, snapshot.users_done))
        while len(self._window) > 2 and self._window[1][0] <= elapsed_s - RATE_WINDOW_S:
            self._window.popleft()
        then, rows, users = self._window[0]
        passed = max(elapsed_s - then, 1e-3)
        now = Sample(
            seconds=round(self._seconds + elapsed_s, 2),
            rows=self._rows + snapshot.rows,
            rows_per_s=round((snapshot.rows - rows) / passed, 2),
            users_done=snapshot.users_done,
            users_per_s=round((snapshot.users_done - users) / passed, 2),
        )
        points = [Sample(**{**vars(now), **vars(point)}) for point in new]
        return points + [now] if moved else points
