"""Rows of many requests through the model together: bounded in tokens, of like lengths, waiting a few milliseconds at most.

One thread owns the model. A batch starts as soon as the model is free and the oldest row has waited `wait_s`, or enough
rows are there. The oldest row is in every batch, so none waits for ever; those that join it are chosen by length, because a
pass costs what its padded tokens cost. Rows whose caller has gone are skipped. Knows nothing of users or generations.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from plora_ray.errors import PloraError
from plora_ray.inference.observer import BatchDone, EngineObserver

# token ids of each row and its user's record [user_width] or None -> logits [rows, outputs]
Forward = Callable[[Sequence[Sequence[int]], Sequence[np.ndarray | None]], Tensor]

LEAST_FILL = 0.8  # a row's tokens by the padded tokens it adds, below which it had better wait for a batch of its like
CHOSEN_FROM = 8  # times max_rows: the oldest rows among which a batch is chosen


class QueueFull(PloraError):
    """More rows are waiting than the queue may hold: ask again a little later."""


class EngineClosed(PloraError):
    """The engine was replaced by one of another generation: ask that one."""


@dataclass
class _Row:
    ids: Sequence[int]
    record: np.ndarray | None  # held until the answer: whatever evicts the user meanwhile doesn't touch it
    arrived_s: float
    future: Future[Tensor] = field(default_factory=Future)


class Batcher:
    """Futures of logits [outputs] for single rows, computed in batches.

    max_tokens bounds rows x longest row of a batch, max_rows its rows, max_queued the rows waiting. pass_tokens: what a pass
    costs beyond its tokens, in tokens; padding up to it is cheaper than one more pass.
    """

    def __init__(
        self,
        forward: Forward,
        *,
        max_tokens: int,
        max_rows: int,
        wait_s: float,
        max_queued: int,
        pass_tokens: int = 0,
        observer: EngineObserver | None = None,
    ) -> None:
        self._forward, self._observer, self._pass_tokens = forward, observer or EngineObserver(), pass_tokens
        self._max_tokens, self._max_rows, self._wait_s, self._max_queued = max_tokens, max_rows, wait_s, max_queued
        self._rows: deque[_Row] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    def submit(self, rows: Sequence[tuple[Sequence[int], np.ndarray | None]]) -> list[Future[Tensor]]:
        """Queue rows (token ids, user's record [user_width] or None), all or none. Raises QueueFull, EngineClosed."""
        now = time.monotonic()
        queued = [_Row(ids, record, now) for ids, record in rows]
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
            began = time.monotonic()
            try:
                logits = self._forward([row.ids for row in live], [row.record for row in live])
            except Exception as error:  # the callers are told; the thread must go on for others
                for row in live:
                    row.future.set_exception(error)
                continue
            done = _measured(live, began)  # before the callers go on: what they asked for is counted when they look
            self._observer.on_batch(done)
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
        """The oldest row and others of like length, while rows x longest stays in the budget."""
        near = [self._rows.popleft() for _ in range(min(len(self._rows), CHOSEN_FROM * self._max_rows))]
        wanted = len(near[0].ids)
        order = sorted(range(1, len(near)), key=lambda place: abs(len(near[place].ids) - wanted))  # stable: older rows first
        chosen, tokens, longest = {0}, wanted, wanted
        for place in order:
            length = len(near[place].ids)
            padded = max(longest, length) * (len(chosen) + 1)
            if len(chosen) == self._max_rows:
                break
            # What this row adds to the pass, its own padding and that of the others: much more than its tokens, and it had better wait.
            costly = padded - longest * len(chosen) > length / LEAST_FILL
            if padded > self._max_tokens or (costly and padded - tokens - length > self._pass_tokens):
                continue
            chosen.add(place)
            tokens, longest = tokens + length, max(longest, length)
        self._rows.extendleft(row for place, row in reversed(list(enumerate(near))) if place not in chosen)
        return [row for place, row in enumerate(near) if place in chosen]


def _measured(rows: Sequence[_Row], began: float) -> BatchDone:
    tokens = [len(row.ids) for row in rows]
    waits = [began - row.arrived_s for row in rows]
    return BatchDone(len(rows), sum(tokens), len(rows) * max(tokens), waits, time.monotonic() - began)
