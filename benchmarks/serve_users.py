"""Many users: throughput by how many there are, a million in memory, and adapting to a few examples."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from benchmarks.figures import Figure, seconds, speed_ratio, spread
from benchmarks.made_generation import LABELS, name_of, publish, zipf_users
from cluster.s3_server import S3Server
from plora_ray.inference import Examples, FewShotFitter, InferenceEngine, load_generation
from plora_ray.inference.cache import entry_bytes
from plora_ray.inference.disk_tier import DiskTier
from plora_ray.store import AdapterStore

REQUEST_ROWS = 4
CLIENTS = 8
EXAMPLES = 8


def ask(engine: InferenceEngine, users: list[str], texts: list[str]) -> None:
    """Requests of a few rows from several clients at once, until every user was asked for."""
    rows = [(user, texts[place % len(texts)]) for place, user in enumerate(users)]
    requests = iter([rows[start : start + REQUEST_ROWS] for start in range(0, len(rows), REQUEST_ROWS)])
    lock = threading.Lock()

    def client() -> None:
        while True:
            with lock:
                request = next(requests, None)
            if request is None:
                return
            engine.predict(request)

    with ThreadPoolExecutor(CLIENTS) as threads:
        for running in [threads.submit(client) for _ in range(CLIENTS)]:
            running.result()


def zipf_100k_vs_5(texts: list[str], *, users: int, asked: int, rounds: int) -> Figure:
    """Rows a second with users drawn by Zipf's law from many / the same from five, one engine with all of them resident."""
    with tempfile.TemporaryDirectory(prefix="plora-serve-") as folder:
        store = AdapterStore(folder)
        publish(store, users)
        engine = InferenceEngine(load_generation(store), batch_rows=32, wait_s=0.002, resident="on")
        many, few = zipf_users(users, asked, seed=1), zipf_users(5, asked, seed=1)
        figure = speed_ratio("zipf_100k_vs_5", lambda: ask(engine, many, texts), lambda: ask(engine, few, texts), rounds=rounds, goal=0.95)
        engine.close()
    return figure


def working_set_four_times_the_cache(texts: list[str], *, users: int, asked: int, rounds: int) -> Iterator[Figure]:
    """Rows a second with private matrices of four times as many users as fit the memory / all of them in memory.

    Once pulled from an S3 server every time, once with a disk tier that has room for all, as it is after a while of serving.
    """
    with tempfile.TemporaryDirectory(prefix="plora-serve-") as folder, S3Server(Path(folder, "s3")) as server:
        store = AdapterStore(f"{server.create_bucket('bench')}/store", server.storage_options)
        publish(store, users, "lora")
        entry = entry_bytes(store.open_generation().manifest.width * 4)
        disk = DiskTier(Path(folder, "disk"), 2 * users * entry)
        s3, tiered, memory = (
            InferenceEngine(load_generation(store), batch_rows=32, wait_s=0.002, cache_bytes=size * entry, max_age_s=3600, disk=tier)
            for size, tier in ((users // 4, None), (users // 4, disk), (users, None))
        )
        drawn = np.random.default_rng(2).integers(users, size=(rounds + 1) * asked)
        names = [name_of(int(user)) for user in drawn]
        keys = [store.key(name_of(user)) for user in range(users)]
        for engine in (tiered, memory):
            engine.cache.find(keys)
        for name, small in (("working_set_4x_cache_s3_vs_in_memory", s3), ("working_set_4x_memory_on_disk_vs_in_memory", tiered)):
            turns = iter([names[start : start + asked] for start in range(0, len(names), asked)])
            yield speed_ratio(
                name, lambda small=small, turns=turns: ask(small, next(turns), texts), lambda: ask(memory, names[:asked], texts),
                rounds=rounds, goal=0.7,
            )  # fmt: skip
        for engine in (s3, tiered, memory):
            engine.close()


def resident_users(users: int) -> Iterator[Figure]:
    """A process of its own opens an engine with all users in memory: seconds until it answers, and memory, beside one user's."""
    with tempfile.TemporaryDirectory(prefix="plora-serve-") as folder:
        publish(AdapterStore(f"{folder}/one"), 1)
        publish(AdapterStore(f"{folder}/all"), users)
        one, all_ = (_opened_alone(f"{folder}/{name}") for name in ("one", "all"))
    for name, value, unit in (
        (f"resident_{users}_users.ready", all_["ready_s"], "s"),
        ("resident_1_user.ready", one["ready_s"], "s"),
        (f"resident_{users}_users.memory", all_["mib"], "MiB"),
        ("resident_1_user.memory", one["mib"], "MiB"),
        (f"resident_{users}_users.bytes_per_user", (all_["mib"] - one["mib"]) * 2**20 / users, "bytes"),
    ):
        yield spread(name, [value], unit=unit, goal=None)


def _opened_alone(uri: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.serve_users", uri]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def open_resident(uri: str) -> None:
    """Print seconds to the first answer, imports not counted, and this process's memory then."""
    import psutil

    def first_answer() -> InferenceEngine:
        store = AdapterStore(uri, create=False)
        engine = InferenceEngine(load_generation(store), resident="on", cache_bytes=2**30)
        engine.predict([(name_of(0), "a text")])
        return engine

    engines: list[InferenceEngine] = []
    ready_s = seconds(lambda: engines.append(first_answer()))
    print(json.dumps({"ready_s": ready_s, "mib": psutil.Process().memory_info().rss / 2**20}))


def adaptation(texts: list[str], *, users: int, rounds: int) -> Iterator[Figure]:
    """From eight examples to a fitted adapter and an answer by it; and many users' fits as one against one after the other."""
    with tempfile.TemporaryDirectory(prefix="plora-serve-") as folder:
        store = AdapterStore(folder)
        publish(store, 1)
        loaded = load_generation(store)
        fitter = FewShotFitter(loaded)
        rng = np.random.default_rng(0)
        wanted = [
            Examples([texts[place] for place in rng.integers(len(texts), size=EXAMPLES)], list(rng.choice(LABELS.classes, EXAMPLES)))
            for _ in range(users)
        ]
        alone = [seconds(lambda user=user: fitter.fit_many([user])) for user in wanted[: 4 * rounds]]
        yield spread("adaptation_of_8_examples", alone, unit="s", goal=2.0)
        yield speed_ratio(
            f"adaptation_of_{users}_together_vs_one_by_one", lambda: fitter.fit_many(wanted),
            lambda: [fitter.fit_many([user]) for user in wanted], rounds=rounds, goal=8.0,
        )  # fmt: skip


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    open_resident(sys.argv[1])
