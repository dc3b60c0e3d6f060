"""All users of a long-tailed set fitted: cost and memory of a rank as the number of users grows.

    python -m benchmarks.scale [--data ../shared/data/nsmc_ko.parquet] [--users 10000 --users 50000 --users 0] --json

The real job on a local cluster with two CPU ranks: ratings as a regression, texts cut to a few tokens, adapters in the top
two layers, a population stage over a small share of the rows, then every user. Costs are processor seconds of the ranks,
which other work on the machine changes less than the clock.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import typer

from benchmarks.figures import Figure
from benchmarks.processes import cpu_seconds, is_worker, pss
from plora_ray.config import parse_settings
from plora_ray.runtime import ray_cluster

SAMPLE_S = 1.0
RANK = "RayTrainWorker"


@dataclass
class Ranks:
    """Of the ranks' processes. peak_mib: of the largest. seconds: processor time by process."""

    peak_mib: float = 0.0
    seconds: dict[int, float] = field(default_factory=dict)

    def sample(self) -> None:
        """Look once."""
        for process in psutil.Process().children(recursive=True):
            if is_worker(process, RANK):
                self.peak_mib = max(self.peak_mib, pss(process))
                self.seconds[process.pid] = max(self.seconds.get(process.pid, 0.0), cpu_seconds(process))


@contextmanager
def watched() -> Iterator[Ranks]:
    """The ranks while the body runs."""
    ranks, ended = Ranks(), threading.Event()

    def watch() -> None:
        while not ended.wait(SAMPLE_S):
            ranks.sample()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield ranks
    finally:
        ended.set()
        thread.join()


def write_users(source: Path, target: Path, users: int) -> int:
    """The rows of the first `users` users in order of appearance (0: of all), ratings as numbers; returns how many rows."""
    table = pq.read_table(source, columns=["user_id", "text", "label"])
    if users:
        chosen = pc.unique(table["user_id"])[:users]
        table = table.filter(pc.is_in(table["user_id"], chosen))
    place = table.schema.get_field_index("label")
    pq.write_table(table.set_column(place, "label", table["label"].cast(pa.float64())), target)
    return int(table.num_rows)


def main(
    data: Annotated[Path, typer.Option(help="A parquet file: user_id, text, label (a number).")] = Path("../shared/data/nsmc_ko.parquet"),
    users: Annotated[list[int] | None, typer.Option(help="Numbers of users; 0 is all.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens a text is cut to.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Train on each number of users; a line each, then what grows and what doesn't."""
    runs = []
    for count in users or [10_000, 50_000, 0]:
        with tempfile.TemporaryDirectory(prefix="plora-scale-") as folder:
            runs.append(train_once(data, Path(folder), count, tokens))
        print(json.dumps(runs[-1]), flush=True)
    small, large = runs[0], runs[-1]
    level = large["rank_peak_mib"] / small["rank_peak_mib"]
    cost = (large["cpu_seconds"] / large["rows"]) / (small["cpu_seconds"] / small["rows"])
    for name, value in (("scale_rank_peak_vs_smallest", level), ("scale_cost_a_row_vs_smallest", cost)):
        Figure(name, *[round(value, 3)] * 3, "ratio", 1.1).emit(as_json)


def train_once(data: Path, folder: Path, count: int, tokens: int) -> dict[str, float]:
    """One job; its store is deleted with `folder`."""
    rows = write_users(data, folder / "rows.parquet", count)
    settings = parse_settings({
        "task": "regression",
        "model": {"max_length": tokens},
        "adapter": {"top_layers": 2},
        "data": {"source": str(folder / "rows.parquet"), "test_fraction": 0.02, "validation_fraction": 0.0},
        "training": {
            "num_workers": 2, "epochs": 1, "population_fraction": float(np.clip(20_000 / rows, 0, 1)), "batch_rows": 256,
            "activation_cache_mb": 0, "activation_disk_mb": 0,
        },
        "store": {"uri": str(folder / "store")},
    })  # fmt: skip
    with ray_cluster(cpus=2), watched() as ranks:
        from plora_ray.training.job import train  # after the cluster's environment is set

        began = time.monotonic()
        published = train(settings)
        seconds = time.monotonic() - began
    shutil.rmtree(folder / "store")
    return {
        "users": published.users, "rows": rows, "seconds": round(seconds, 1), "cpu_seconds": round(sum(ranks.seconds.values()), 1),
        "rank_peak_mib": round(ranks.peak_mib, 1),
    }  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
