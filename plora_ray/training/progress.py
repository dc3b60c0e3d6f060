"""What people see while a job runs: one line with users done, users/s and time left. Drawn on standard error.

On a terminal it is a moving bar; elsewhere (a job log) one line whenever a tenth more is done or the stage changes.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from plora_ray.data.partition import PartitionProgress


@dataclass(frozen=True)
class StepPoint:
    """One point of the population stage's curves: the mean loss over the ranks' newest steps, and the learning rate."""

    step: int
    loss: float
    learning_rate: float


@dataclass
class Snapshot:
    """Progress of all ranks together. step, steps: the population stage's; users: fitted by the user stage, and how many there are.

    rows: gone through in both stages by this start of the job. starts: of the group of workers; the first isn't a restart.
    parameter_bytes: of the whole model; parameter_bytes_held: by rank. points: new ones, `points_before` came before them.
    """

    step: int = 0
    steps: int = 0
    loss: float = float("nan")
    rows: int = 0
    users_done: int = 0
    users: int = 0
    starts: int = 0
    ranks: int = 0
    sharding: str = ""
    parameter_bytes: int = 0
    parameter_bytes_held: dict[int, int] = field(default_factory=dict)
    points: list[StepPoint] = field(default_factory=list)
    points_before: int = 0

    @property
    def model(self) -> str:
        """How the model lies on the ranks, in one line; empty until all of them have told."""
        if not self.ranks or len(self.parameter_bytes_held) < self.ranks:
            return ""
        least, most = (bound(self.parameter_bytes_held.values()) / 2**20 for bound in (min, max))
        held = f"{most:,.1f} MiB" if f"{least:.1f}" == f"{most:.1f}" else f"{least:,.1f} to {most:,.1f} MiB"
        return f"{self.ranks} ranks, {self.sharding}: {self.parameter_bytes / 2**20:,.1f} MiB of parameters, {held} on each rank"


@dataclass
class ProgressLine:
    """Shows snapshots as they come; a context manager, so that the terminal is whole again afterwards."""

    users_at_start: int = 0
    _stage: str = ""
    _stage_began_s: float = 0.0
    _printed_tenth: int = -1
    _task: TaskID | None = None
    _console: Console = field(default_factory=lambda: Console(file=sys.stderr, soft_wrap=True))

    def __enter__(self) -> ProgressLine:
        columns = (
            TextColumn("{task.description:<18}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, highlight=False, markup=False)

    def show_partitioning(self, progress: PartitionProgress) -> None:
        """Draw how far reading or tokenising is."""
        unit = "sources" if progress.stage == "read" else "partitions"
        note = f"{progress.rows:,} rows, {progress.done}/{progress.total} {unit}"
        self._draw(f"{progress.stage} rows", progress.done, progress.total, note)

    def show(self, snapshot: Snapshot) -> None:
        """Draw the newest state."""
        if snapshot.users_done > self.users_at_start or (snapshot.steps and snapshot.step >= snapshot.steps):
            self._draw("user stage", snapshot.users_done, snapshot.users, self._users_note(snapshot))
        elif snapshot.steps:
            self._draw(
                "population stage", snapshot.step, snapshot.steps, f"step {snapshot.step}/{snapshot.steps}  loss {snapshot.loss:.4f}"
            )

    def _users_note(self, snapshot: Snapshot) -> str:
        seconds = max(time.monotonic() - self._stage_began_s, 1e-3) if self._stage == "user stage" else 0.0
        done = f"{snapshot.users_done:,}/{snapshot.users:,} users"
        if not seconds:  # the first that is seen of the stage
            return done
        rate = (snapshot.users_done - self.users_at_start) / seconds
        left = timedelta(seconds=round((snapshot.users - snapshot.users_done) / rate)) if rate else "?"
        return f"{done}  {rate:,.1f} users/s" + ("" if self._console.is_terminal else f"  {left} left")

    def _draw(self, stage: str, done: int, total: int, note: str) -> None:
        if stage != self._stage:
            self._stage, self._stage_began_s, self._printed_tenth = stage, time.monotonic(), -1
            if self._task is not None:
                self._bar.stop_task(self._task)
            self._task = self._bar.add_task(stage, total=total, note=note)
        assert self._task is not None
        self._bar.update(self._task, completed=done, total=total, note=note)
        tenth = done * 10 // max(total, 1)
        if not self._console.is_terminal and tenth > self._printed_tenth:
            self._printed_tenth = tenth
            self.say(f"{stage}: {note}")
