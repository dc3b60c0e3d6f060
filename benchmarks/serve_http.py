"""The service over HTTP: against its own engine in process, and against Ray Serve's multiplexing with PEFT.

Servers are processes of their own with one CPU for the model; requests come from this process over many connections.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
import yaml

from benchmarks.figures import Figure, seconds, spread
from benchmarks.made_generation import MODEL, name_of, publish, zipf_users
from cluster.node_process import free_port
from plora_ray.inference import InferenceEngine, load_generation
from plora_ray.store import AdapterStore

CONNECTIONS = 32
READY_WITHIN_S = 180
Row = tuple[str, str]
Request = tuple[dict[str, Any], dict[str, str]]  # body and headers


def http_vs_engine(texts: list[str], *, users: int, asked: int, rounds: int) -> Iterator[Figure]:
    """Texts a second over HTTP at saturation / of the same engine in process; and what one connection waits longer."""
    with tempfile.TemporaryDirectory(prefix="plora-serve-") as folder, _ours(Path(folder), users) as url:
        torch.set_num_threads(1)
        engine = InferenceEngine(load_generation(AdapterStore(f"{folder}/store")), batch_rows=64, wait_s=0.002, resident="on")
        rows = [(user, texts[place % len(texts)]) for place, user in enumerate(zipf_users(users, asked, seed=3))]
        ratios, added_ms = [], []

        def inside() -> None:  # as many texts at a time as there are connections, all at once: the engine at its best
            for start in range(0, len(rows), CONNECTIONS):
                engine.predict(rows[start : start + CONNECTIONS])

        inside()
        _load(url, [_to_us(row) for row in rows])
        for _ in range(rounds):
            ratios.append(seconds(inside) / _load(url, [_to_us(row) for row in rows]).seconds)
            added_ms += _added_latency_ms(url, engine, rows[:20])
        engine.close()
    yield spread("http_vs_engine", ratios, unit="ratio", goal=0.85)
    yield spread("http_added_latency_at_one_connection", added_ms, unit="ms", goal=5.0)


def http_vs_multiplexed_peft(texts: list[str], *, users: int, asked: int, rounds: int) -> Iterator[Figure]:
    """Requests a second, one text each, users by Zipf's law: ours / Serve's multiplexing with a PEFT adapter a user."""
    from benchmarks.multiplexed_peft import write_adapters

    rows = [(user, texts[place % len(texts)]) for place, user in enumerate(zipf_users(users, asked, seed=4))]
    with tempfile.TemporaryDirectory(prefix="plora-serve-") as folder:
        write_adapters(Path(folder, "peft"), [name_of(user) for user in range(users)])
        with _ours(Path(folder), users) as ours, _multiplexed(Path(folder, "peft")) as theirs:
            sides: dict[str, Callable[[], Loaded]] = {
                "ours": lambda: _load(ours, [_to_us(row) for row in rows]),
                "peft": lambda: _load(theirs, [({"text": text}, {"serve_multiplexed_model_id": user}) for user, text in rows]),
            }
            for side in sides.values():
                side()
            found = [{name: side() for name, side in sides.items()} for _ in range(rounds)]
    yield spread("http_vs_multiplexed_peft", [turn["peft"].seconds / turn["ours"].seconds for turn in found], unit="ratio", goal=20.0)
    for name in sides:
        yield spread(f"http_vs_multiplexed_peft.{name}", [asked / turn[name].seconds for turn in found], unit="requests/s", goal=None)
        p99 = [1000 * float(np.percentile(turn[name].latencies_s, 99)) for turn in found]
        yield spread(f"http_vs_multiplexed_peft.{name}_p99", p99, unit="ms", goal=None)


class Loaded:
    """A load's whole time and each request's."""

    def __init__(self, seconds: float, latencies_s: list[float]) -> None:
        self.seconds, self.latencies_s = seconds, latencies_s


def _load(url: str, requests: list[Request], connections: int = CONNECTIONS) -> Loaded:
    """Send all requests over so many connections. Raises httpx.HTTPStatusError if one fails."""

    async def run() -> Loaded:
        left, latencies = iter(requests), []
        async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=connections)) as http:

            async def connection() -> None:
                for body, headers in left:
                    began = time.perf_counter()
                    (await http.post(url, json=body, headers=headers)).raise_for_status()
                    latencies.append(time.perf_counter() - began)

            began = time.perf_counter()
            await asyncio.gather(*(connection() for _ in range(connections)))
            return Loaded(time.perf_counter() - began, latencies)

    return asyncio.run(run())


def _to_us(row: Row) -> Request:
    return {"inputs": [{"user_id": row[0], "text": row[1]}]}, {"X-User-Id": row[0]}


def _added_latency_ms(url: str, engine: InferenceEngine, rows: list[Row]) -> list[float]:
    """The difference of the medians, of one text at a time."""
    outside = _load(url, [_to_us(row) for row in rows], connections=1).latencies_s
    inside = []
    for row in rows:
        began = time.perf_counter()
        engine.predict([row])
        inside.append(time.perf_counter() - began)
    return [1000 * float(np.median(outside) - np.median(inside))]


@contextmanager
def _ours(folder: Path, users: int) -> Iterator[str]:
    """`plora serve` with one replica; the URL of predictions."""
    publish(AdapterStore(str(folder / "store")), users)
    settings = folder / "settings.yaml"
    tree = {"model": {"name": MODEL}, "store": {"uri": str(folder / "store")}, "serving": {"replicas": 1, "replica_cpus": 1}}
    settings.write_text(yaml.safe_dump(tree))
    port = free_port()
    command = [str(Path(sys.executable).with_name("plora")), "serve", "--config", str(settings), "--port", str(port)]
    with _running(command, "ready:", folder / "ours.log"):
        yield f"http://127.0.0.1:{port}/v1/predict"


@contextmanager
def _multiplexed(adapters: Path) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.multiplexed_peft", str(adapters), str(port)]
    with _running(command, "ready", adapters.parent / "peft.log"):
        yield f"http://127.0.0.1:{port}/"


@contextmanager
def _running(command: list[str], ready: str, log: Path) -> Iterator[None]:
    """A process that has printed a line that begins with `ready`; stopped at the end."""
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        deadline = time.monotonic() + READY_WITHIN_S
        while not any(line.startswith(ready) for line in log.read_text().splitlines()):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{' '.join(command)} did not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.2)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # a session of its own, so nobody else's
            process.wait()
