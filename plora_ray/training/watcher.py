"""The driver's thread that looks at the board while ranks work: draws progress, keeps the history, feeds telemetry."""

from __future__ import annotations

import threading
import time
from typing import Any

import ray

from plora_ray.errors import StoreError
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
        self._warned = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watcher", daemon=True)

    def __enter__(self) -> None:
        self._keep(self._history.job_began)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()
        self._keep(self._history.save)

    def _watch(self) -> None:
        while not self._stop.wait(POLL_S):
            self._look()

    def _look(self) -> None:
        try:
            snapshot: Snapshot = ray.get(self._board.snapshot.remote(self._meter.points_seen), timeout=5)
        except ray.exceptions.RayError:
            return  # the board comes back with its node, or the job fails with a better message
        elapsed_s = time.monotonic() - self._began_s
        if snapshot.model and snapshot.starts != self._starts:
            self._began(snapshot, elapsed_s)
        samples = self._meter.read(snapshot, elapsed_s)
        self._telemetry.write(samples)
        self._keep(lambda: self._history.write(samples))
        self._line.show(snapshot)

    def _began(self, snapshot: Snapshot, elapsed_s: float) -> None:
        """A group of workers stands: the job's first, or one that Ray Train started after a failure or a resize."""
        self._line.say(snapshot.model if not self._starts else f"workers started again: {snapshot.model}")
        start = Start(
            seconds=round(self._base_s + elapsed_s, 2),
            resumed=self._starts == 0 and self._history.jobs > 1,
            sharding=snapshot.sharding,
            parameter_bytes=snapshot.parameter_bytes,
            parameter_bytes_held=[held for _, held in sorted(snapshot.parameter_bytes_held.items())],
        )
        self._starts = snapshot.starts
        self._keep(lambda: self._history.began(start))

    def _keep(self, write: Any) -> None:
        """The history is a comfort: a store that fails for a while mustn't end the thread, and ranks meet the failure themselves."""
        try:
            write()
        except StoreError as error:
            if not self._warned:
                self._warned = True
                self._line.say(f"warning: the history can't be kept for now: {error}")
