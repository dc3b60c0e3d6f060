"""What a sink is, and the threads that feed sinks while a job runs."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from plora_ray.training.telemetry.sample import Sample

MOST_WAITING = 10_000  # samples kept for a sink that fails; older ones are given up
CLOSE_S = 60.0  # how long the end of a job waits for a slow sink


class Sink(Protocol):
    """A place for figures. Any call may raise; what `write` raised on comes again later, with newer samples."""

    name: str

    def write(self, samples: Sequence[Sample]) -> None:
        """Samples in the order of time."""

    def finish(self, report: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        """The generation is published: its report.json as values, and the report's files by name."""

    def close(self) -> None:
        """No further call; unfinished after a failure, when the same run may go on in another process."""


class Telemetry:
    """Hands samples to all sinks, each in a thread of its own. A failing sink is warned of once and tried again.

    A context manager: leaving it gives what is left to the sinks and closes them. warn: prints a line.
    """

    def __init__(self, sinks: Sequence[Sink], warn: Callable[[str], None]) -> None:
        self._feeds = [_Feed(sink, warn) for sink in sinks]

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(self, *_: object) -> None:
        for feed in self._feeds:
            feed.end()
        for feed in self._feeds:
            feed.join()

    def write(self, samples: Sequence[Sample]) -> None:
        """Queue samples; returns at once."""
        for feed in self._feeds:
            feed.put(list(samples))

    def finish(self, report: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        """Queue the published report; returns at once."""
        for feed in self._feeds:
            feed.put((report, files))


class _Feed:
    """One sink's thread and queue."""

    def __init__(self, sink: Sink, warn: Callable[[str], None]) -> None:
        self._sink, self._warn, self._warned = sink, warn, False
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"telemetry-{sink.name}", daemon=True)
        self._thread.start()

    def put(self, item: object) -> None:
        if item:
            self._queue.put(item)

    def end(self) -> None:
        self._queue.put(None)

    def join(self) -> None:
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            self._fail(f"did not take everything within {CLOSE_S:.0f} s")

    def _run(self) -> None:
        waiting: list[Sample] = []
        while (item := self._queue.get()) is not None:
            if isinstance(item, tuple):
                self._try(self._sink.write, waiting)
                waiting = []
                self._try(self._sink.finish, *item)
                continue
            waiting = [*waiting, *item][-MOST_WAITING:]
            if self._queue.empty() and self._try(self._sink.write, waiting):
                waiting = []
        if waiting:
            self._try(self._sink.write, waiting)
        self._try(self._sink.close)

    def _try(self, call: Callable[..., None], *arguments: object) -> bool:
        try:
            call(*arguments)
        except Exception as error:  # whatever a client library raises: figures must never end a training
            self._fail(f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}")
            return False
        return True

    def _fail(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            self._warn(f"warning: {self._sink.name} {what}; training goes on without it for now")
