"""The driver's thread that looks at the board while ranks work: draws progress, keeps the history, feeds telemetry."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

import ray

from plora_ray.training.progress import ProgressLine, Snapshot
from plora_ray.training.telemetry import Meter, Telemetry
from plora_ray.training.telemetry.history import History, Start

POLL_S = 0.5


class Watcher:
    """A context manager around the work of the ranks. users_done: by earlier starts of the run."""

    def __init__(self, board: Any, line: ProgressLine, telemetry: Telemetry, history: History, users_done: int) -> None:
        self._board, self._line, self._telemetry, self._history = board, line, telemetry, history
        self._meter = Meter(history.seconds, history.rows, users_done)
        self._base_s, self._began_s = history.seconds, time.monotonic()
        self._starts = 0
        self._warned: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watcher", daemon=True)

    def __enter__(self) -> None:
        self._guarded("the history can't be kept", self._history.job_began)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()
        self._guarded("the history can't be kept", self._history.save)

    def _watch(self) -> None:
        while not self._stop.wait(POLL_S):
            self._look()

    def _look(self) -> None:
        self._guarded("progress can't be followed", self._take_snapshot)

    def _take_snapshot(self) -> None:
        try:
            snapshot: Snapshot = ray.get(self._board.snapshot.remote(self._meter.points_seen), timeout=5)
        except ray.exceptions.RayError:
            return  # the board comes back with its node, or the job fails with a better message
        elapsed_s = time.monotonic() - self._began_s
        said = ""
        if snapshot.model and snapshot.starts != self._starts:
            said = f"workers started again: {snapshot.model}" if self._starts else snapshot.model
            start, self._starts = self._start(snapshot, elapsed_s), snapshot.starts
            self._guarded("the history can't be kept", lambda: self._history.began(start))
        samples = self._meter.read(snapshot, elapsed_s)
        self._telemetry.write(samples)
        self._guarded("the history can't be kept", lambda: self._history.write(samples))
        if said:
            self._line.say(said)
        self._line.show(snapshot)

    def _start(self, snapshot: Snapshot, elapsed_s: float) -> Start:
        """A group of workers that stands: the job's first, or one that Ray Train started after a failure or a resize."""
        return Start(
            seconds=round(self._base_s + elapsed_s, 2),
            resumed=self._starts == 0 and self._history.jobs > 1,
            sharding=snapshot.sharding,
            parameter_bytes=snapshot.parameter_bytes,
            parameter_bytes_held=[held for _, held in sorted(snapshot.parameter_bytes_held.items())],
        )

    def _guarded(self, failure: str, call: Callable[[], None]) -> None:
        """What is watched is a comfort: nothing that fails here may end the thread or stand before the reason why a training stopped."""
        try:
            call()
        except Exception as error:
            if failure not in self._warned:
                self._warned.add(failure)
                with contextlib.suppress(Exception):  # the terminal itself may be what fails
                    self._line.say(f"warning: {failure} for now: {(str(error).splitlines() or [type(error).__name__])[0][:200]}")
