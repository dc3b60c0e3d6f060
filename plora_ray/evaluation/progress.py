"""What people see while an evaluation runs, on standard error: a bar a stage on a terminal, a line a stage elsewhere."""

from __future__ import annotations

import sys
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Stages:
    """The stages of a run, one after the other; a context manager, so that the terminal is whole again afterwards."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stderr)
        columns = (TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def begin(self, stage: str, total: int) -> None:
        """A new stage of `total` steps; 0 if that isn't known yet."""
        if self._task is not None:
            self._bar.stop_task(self._task)
        self._task = self._bar.add_task(stage, total=total)
        if not self._console.is_terminal:
            self.say(f"{stage}: {total:,}" if total else stage)

    def advance(self, steps: int) -> None:
        """So many steps of the stage are done."""
        assert self._task is not None, "begin() comes first"
        self._bar.advance(self._task, steps)

    def at(self, done: int, total: int) -> None:
        """`done` of `total` steps of the stage are done, where the total becomes known only now."""
        assert self._task is not None, "begin() comes first"
        self._bar.update(self._task, completed=done, total=total)
