"""Partitioning in tasks whose memory doesn't follow the size of the source. Each size runs in a process of its own, without Ray."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROWS = 20_000
ROWS_PER_GROUP = 5_000
WORDS = "film scene actor story music camera ending dialogue " * 8

MEASURE = """
import json, resource, sys
import psutil
from plora_ray.data import fragments
from plora_ray.data.fragments import Fragment
from plora_ray.data.passes import PartitionJob, fragment_unit, finish_partition
from plora_ray.data.source_settings import SourceSettings
from plora_ray.data.sources import list_units
from plora_ray.store import ObjectStore
import numpy as np

small, large, out, tokenizer, partitions = *sys.argv[1:5], int(sys.argv[5])
fragments.FRAGMENT_CHARS = 2**20  # several fragments a row group, as a real source has

def run(source, partitions, destination):
    objects = ObjectStore(destination)
    job = PartitionJob(SourceSettings(source=source), "classification", objects, "fragments", partitions, tokenizer, 32, b"s" * 32)
    found, rows = [], 0
    for index, unit in enumerate(list_units(job.settings)):
        result = json.loads(fragment_unit(job, json.dumps({"index": index, "unit": unit.model_dump()})))
        assert result["error"] is None, result["error"]
        found += [Fragment(path, np.array(offsets)) for path, offsets in result["fragments"]]
        rows += result["rows"]
    pieces = [[piece.path, piece.start, piece.stop] for fragment in found if (piece := fragment.piece(0))]
    result = json.loads(finish_partition(job, json.dumps({"partition": 0, "pieces": pieces})))
    assert result["error"] is None, result["error"]
    return rows

run(small, 1, out + "/warm-up")
before = psutil.Process().memory_info().rss
rows = run(large, partitions, out + "/measured")
print(json.dumps({"rows": rows, "grown_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before}))
"""


def write_rows(path: Path, rows: int) -> None:
    numbers = np.arange(rows)
    table = pa.table(
        {
            "user_id": [f"user-{number}" for number in numbers // 5],
            "text": [f"{number} {WORDS}" for number in numbers],
            "label": numbers % 2,
        }
    )
    pq.write_table(table, path, row_group_size=ROWS_PER_GROUP)


def grown_mib(folder: Path, rows: int, partitions: int, tokenizer_path: str) -> float:
    """By how much the peak lies above what a process holds that has read and tokenised a few rows already."""
    small, large = folder / "small.parquet", folder / f"{rows}.parquet"
    write_rows(small, 500)
    write_rows(large, rows)
    arguments = [small, large, folder / f"out-{rows}", tokenizer_path, partitions]
    ran = subprocess.run([sys.executable, "-c", MEASURE, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    seen = json.loads(ran.stdout)
    assert seen["rows"] == rows
    return float(seen["grown_bytes"]) / 2**20


def test_four_times_the_rows_in_four_times_the_partitions_need_no_more_memory(tmp_path: Path, tokenizer_path: str) -> None:
    once = grown_mib(tmp_path, ROWS, 1, tokenizer_path)
    four_times = grown_mib(tmp_path, 4 * ROWS, 4, tokenizer_path)
    assert four_times < 2 * once, f"{once:.0f} MiB for {ROWS} rows, {four_times:.0f} MiB for four times as many"
