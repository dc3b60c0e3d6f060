"""The server as operators start it, with requests that never stop coming: what each was answered, and when."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from cluster.node_process import free_port

READY_WITHIN_S = 120.0


@dataclass(frozen=True)
class Sent:
    """A request under load. status 0: the connection broke. Times are monotonic."""

    user: str
    began_s: float
    ended_s: float
    status: int
    personalization: str = ""
    generations: frozenset[str] = frozenset()


class Server:
    """`plora serve` in a process group of its own; at its end everything it started is gone."""

    def __init__(self, config: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = config.with_suffix(".serve.log")
        command = [sys.executable, "-m", "plora_ray.cli", "serve", "--config", str(config), "--port", str(self.port)]
        with self._log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=dict(os.environ))

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_WITHIN_S
        while "ready: " not in self._log.read_text():
            assert self.process.poll() is None and time.monotonic() < deadline, self._log.read_text()[-3000:]
            time.sleep(0.1)

    def replicas(self) -> list[psutil.Process]:
        """The processes of the Predictor replicas."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.cmdline()[:1] and child.cmdline()[0].startswith("ray::ServeReplica:plora:Predictor"):
                    found.append(child)
        return found

    def stop(self) -> None:
        """As a supervisor does: SIGTERM first."""
        children = psutil.Process(self.process.pid).children(recursive=True) if self.process.poll() is None else []
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        for process in [*children, self.process]:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                process.kill()


@contextmanager
def serving(config: Path) -> Iterator[Server]:
    server = Server(config)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


class Load:
    """Threads that ask for their users, round and round, until the block ends; `sent` holds every request."""

    def __init__(self, url: str, users: Sequence[str], threads: int = 4) -> None:
        self.sent: list[Sent] = []
        self._url, self._stop = url, threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(users[place::threads],)) for place in range(threads)]

    def since(self, began_s: float) -> list[Sent]:
        """Requests that began then or later."""
        return [sent for sent in list(self.sent) if sent.began_s >= began_s]

    @property
    def failed(self) -> list[Sent]:
        return [sent for sent in list(self.sent) if sent.status != 200]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, users: Sequence[str]) -> None:
        with httpx.Client(base_url=self._url, timeout=30) as http:
            place = 0
            while not self._stop.is_set():
                user = users[place % len(users)]
                place += 1
                began = time.monotonic()
                try:
                    body = {"inputs": [{"user_id": user, "text": "a text"}] * 2}
                    answer = http.post("/v1/predict", json=body, headers={"X-User-Id": user})
                except httpx.TransportError:
                    self.sent.append(Sent(user, began, time.monotonic(), 0))
                    self._stop.wait(0.05)
                    continue
                rows = answer.json()["predictions"] if answer.status_code == 200 else []
                kinds = "/".join({row["personalization"] for row in rows})
                names = frozenset(row["generation"] for row in rows)
                self.sent.append(Sent(user, began, time.monotonic(), answer.status_code, kinds, names))
