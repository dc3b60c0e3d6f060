"""How often somebody may ask: a token bucket each, in the memory of one replica. Knows no HTTP but the answer 429."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from cachetools import LRUCache

from deployments.problems import Problem

MOST_BUCKETS = 100_000  # of callers met last; who was forgotten begins with a full bucket


@dataclass
class _Bucket:
    tokens: float
    at_s: float


class Rates:
    """Lets each name pass `per_minute` times a minute, and up to `burst` times at once after a pause. Used from one event loop.

    clock: monotonic seconds.
    """

    def __init__(self, per_minute: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second, self._burst, self._clock = per_minute / 60, burst, clock
        self._buckets: LRUCache[Hashable, _Bucket] = LRUCache(MOST_BUCKETS)

    def spend(self, name: Hashable, what: str) -> None:
        """Let `name` pass once. Raises Problem 429 that says when to come back; what: of which there were too many."""
        now = self._clock()
        bucket = self._buckets.get(name)
        if bucket is None:
            bucket = self._buckets[name] = _Bucket(self._burst, now)
        bucket.tokens = min(self._burst, bucket.tokens + (now - bucket.at_s) * self._per_second)
        bucket.at_s = now
        if bucket.tokens < 1:
            wait_s = math.ceil((1 - bucket.tokens) / self._per_second)
            raise Problem(429, f"too many {what}: {self._per_second * 60:g} a minute are taken here", headers={"Retry-After": str(wait_s)})
        bucket.tokens -= 1
