"""Steady HTTP load from outside: requests at a fixed rate, sent whether or not the ones before were answered, each with its fate.

An open loop: a server that stops answering isn't spared, as a closed loop would spare it.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from types import TracebackType
from typing import Self

import httpx
import numpy as np

TIMEOUT_S = 30.0  # as long as the server gives itself: serving.request_timeout_s


@dataclass(frozen=True)
class Sent:
    """A request. fate: "ok", "connection" (it broke or was refused), "timeout", or the status of the answer. Times are monotonic."""

    began_s: float
    ended_s: float
    fate: str


@dataclass(frozen=True)
class Tally:
    """What became of the requests of a stretch of time. Milliseconds are of the answered ones; lost counts the others by fate."""

    sent: int
    lost: dict[str, int]
    p50_ms: float
    p99_ms: float


class OpenLoad:
    """Asks for `users` in turn, `rate` requests a second, until the block ends.

    Both may be changed meanwhile: rate, and most_under_way, which holds requests back while so many are unanswered.
    """

    def __init__(self, url: str, users: Sequence[str], texts: Sequence[str], rate: float) -> None:
        self.rate = rate
        self.most_under_way = math.inf
        self.sent: list[Sent] = []
        self._url, self._users, self._texts = url, users, texts
        self._under_way = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def tally(self, began_s: float, ended_s: float) -> Tally:
        """Of the requests sent in [began_s, ended_s)."""
        part = [one for one in list(self.sent) if began_s <= one.began_s < ended_s]
        answered = [1000 * (one.ended_s - one.began_s) for one in part if one.fate == "ok"]
        p50, p99 = np.percentile(answered, [50, 99]) if answered else (float("nan"), float("nan"))
        return Tally(len(part), dict(Counter(one.fate for one in part if one.fate != "ok")), round(float(p50), 1), round(float(p99), 1))

    async def _run(self) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        async with httpx.AsyncClient(base_url=self._url, timeout=TIMEOUT_S, limits=limits) as http, asyncio.TaskGroup() as under_way:
            due = time.monotonic()
            for place in count():
                if self._stop.is_set():
                    return
                while self._under_way >= self.most_under_way and not self._stop.is_set():
                    await asyncio.sleep(0.001)
                under_way.create_task(self._ask(http, place))
                due = max(due + 1 / self.rate, time.monotonic() - 1)  # after a pause of this process no burst makes up for it
                await asyncio.sleep(max(0.0, due - time.monotonic()))

    async def _ask(self, http: httpx.AsyncClient, place: int) -> None:
        user = self._users[place % len(self._users)]
        body = {"inputs": [{"user_id": user, "text": self._texts[place % len(self._texts)]}]}
        began = time.monotonic()
        self._under_way += 1
        try:
            answer = await http.post("/v1/predict", json=body, headers={"X-User-Id": user})
            fate = "ok" if answer.status_code == 200 else str(answer.status_code)
        except httpx.TimeoutException:
            fate = "timeout"
        except httpx.TransportError:
            fate = "connection"
        self._under_way -= 1
        self.sent.append(Sent(began, time.monotonic(), fate))
