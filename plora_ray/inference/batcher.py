"""Rows of many requests through the model together: bounded in tokens, waiting a few milliseconds at most.

One thread owns the model. A batch starts as soon as the model is free and the oldest row has waited `wait_s`, or enough
rows are there. Rows whose caller has gone are skipped. Knows nothing of users or generations.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from torch import Tensor

from plora_ray.errors import PloraError

# token ids of each row and user vectors [rows, d] or None per row -> logits [rows, outputs]
Forward = Callable[[Sequence[Sequence[int]], Sequence[Tensor | None]], Tensor]


class QueueFull(PloraError):
    """More rows are waiting than the queue may hold: ask again a little later."""


class EngineClosed(PloraError):
    """The engine was replaced by one of another generation: ask that one."""


@dataclass
class _Row:
    ids: Sequence[int]
    vector: Tensor | None
    arrived_s: float
    future: Future[Tensor] = field(default_factory=Future)


class Batcher:
    """Futures of logits [outputs] for single rows, computed in batches.

    max_tokens bounds rows x longest row of a batch, max_rows its rows, max_queued the rows waiting.
    """

    def __init__(self, forward: Forward, *, max_tokens: int, max_rows: int, wait_s: float, max_queued: int) -> None:
        self._forward = forward
        self._max_tokens, self._max_rows, self._wait_s, self._max_queued = max_tokens, max_rows, wait_s, max_queued
        self._rows: deque[_Row] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    def submit(self, rows: Sequence[tuple[Sequence[int], Tensor | None]]) -> list[Future[Tensor]]:
        """Queue rows (token ids, user vector [d] or None), all or none. Raises QueueFull, EngineClosed."""
        now = time.monotonic()
        queued = [_Row(ids, vector, now) for ids, vector in rows]
        with self._changed:
            if self._closed:
                raise EngineClosed("this engine was replaced")
            if len(self._rows) + len(queued) > self._max_queued:
                raise QueueFull(f"{len(self._rows)} texts are waiting already and the queue holds {self._max_queued}")
            self._rows.extend(queued)
            self._changed.notify()
        return [row.future for row in queued]

    def close(self) -> None:
        """Finish what is queued, then stop; nothing new is taken."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while batch := self._next_batch():
            live = [row for row in batch if row.future.set_running_or_notify_cancel()]
            if not live:
                continue
            try:
                logits = self._forward([row.ids for row in live], [row.vector for row in live])
            except Exception as error:  # the callers are told; the thread must go on for others
                for row in live:
                    row.future.set_exception(error)
                continue
            for row, result in zip(live, logits, strict=True):
                row.future.set_result(result)

    def _next_batch(self) -> list[_Row]:
        """The next rows to compute; empty when closed and drained."""
        with self._changed:
            while not self._rows:
                if self._closed:
                    return []
                self._changed.wait()
            deadline = self._rows[0].arrived_s + self._wait_s
            while not self._closed and not self._enough() and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            return self._take()

    def _enough(self) -> bool:
        return len(self._rows) >= self._max_rows or sum(len(row.ids) for row in self._rows) >= self._max_tokens

    def _take(self) -> list[_Row]:
        """Oldest rows first, while rows x longest stays in the budget; at least one."""
        batch: list[_Row] = []
        longest = 0
        while self._rows and len(batch) < self._max_rows:
            longest = max(longest, len(self._rows[0].ids))
            if batch and longest * (len(batch) + 1) > self._max_tokens:
                break
            batch.append(self._rows.popleft())
        return batch
