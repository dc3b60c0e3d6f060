"""What people see while a job runs: one line with users done, users/s and time left. Drawn on standard error.

On a terminal it is a moving bar; elsewhere (a job log) one line whenever a tenth more is done or the stage changes.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from plora_ray.data.partition import PartitionProgress


@dataclass
class Snapshot:
    """Progress of all ranks together. steps: the population stage's; users: fitted by the user stage, and how many there are."""

    step: int = 0
    steps: int = 0
    loss: float = float("nan")
    users_done: int = 0
    users: int = 0
    model: str = ""


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
        rate = (snapshot.users_done - self.users_at_start) / seconds if seconds else 0.0
        return f"{snapshot.users_done:,}/{snapshot.users:,} users  {rate:,.1f} users/s"

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
