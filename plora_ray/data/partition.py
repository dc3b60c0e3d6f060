"""From a source to partitions by user: read, validate, shuffle by user key, tokenise once. The one file that knows Ray Data.

Two passes. Every unit of the source becomes fragments, rows grouped by partition; every partition is then made of its pieces
of all fragments, sorted by user and tokenised. A task holds one fragment or one partition, so memory follows the size of a
partition and never that of the source. Results of the passes are counts: rows travel through the destination's storage.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple
from uuid import uuid4

import numpy as np

from plora_ray.data.fragments import Fragment
from plora_ray.data.passes import BAD_ROWS_SHOWN, PartitionJob, PartitionResult, UnitResult, finish_partition, fragment_unit, load_tokenizer
from plora_ray.data.rows import SPLITS, BadRow, SplitName, Task
from plora_ray.data.source_settings import SourceSettings
from plora_ray.data.sources import fingerprint, list_units
from plora_ray.data.stats import PartitionCounts, PartitionStats, add_labels, label_space, read_done, write_done
from plora_ray.data.table import PartitionTable, read_partition
from plora_ray.data.units import ReadUnit
from plora_ray.errors import DataError
from plora_ray.store.objects import SERVING_RETRY_S, ObjectStore
from plora_ray.store.retries import retrying

__all__ = ["PartitionProgress", "PartitionStats", "PartitionTable", "label_space", "partition_rows", "read_partition"]


class PartitionProgress(NamedTuple):
    """How far a pass is: units read or partitions tokenised of all, and the rows in them."""

    stage: Literal["read", "tokenise"]
    done: int
    total: int
    rows: int


def partition_rows(
    settings: SourceSettings,
    task: Task,
    destination: str,
    partitions: int,
    secret: bytes,
    tokenizer_path: str,
    max_length: int,
    progress: Callable[[PartitionProgress], None] | None = None,
    storage_options: dict[str, Any] | None = None,
    units: list[ReadUnit] | None = None,
    retry_s: float = SERVING_RETRY_S,
) -> PartitionStats:
    """Write `partition-00000.parquet`, `partition-00000.users.safetensors` ... to `destination`, on the running cluster.

    The destination is a folder of its own that all nodes reach. A finished partitioning of the same rows and settings is
    recognised and only its stats are returned; anything half-written is removed and made again. `storage_options` belong to the
    destination, `settings.storage_options` to the source, and passing failures of either are ridden out for `retry_s` seconds;
    `units`: what `list_units(settings)` gave, where the caller has asked already. Raises DataError if the source can't be used
    as it is, StoreError if the destination can't, ModelError if the tokenizer can't be loaded.
    """
    import ray  # seconds to import, and who only reads partitions has no use for it

    if not ray.is_initialized():
        raise DataError("partitioning runs on a Ray cluster: call ray.init() first")
    objects = ObjectStore(destination, storage_options, retry_s=retry_s)
    units = retrying(retry_s)(list_units, settings) if units is None else units
    # A name of its own, so that a task which outlived an earlier attempt can't write among this one's fragments.
    fragments = f"fragments-{uuid4().hex}"
    job = PartitionJob(settings, task, objects, fragments, partitions, tokenizer_path, max_length, secret)
    digest = _digest(job, units)
    finished = read_done(objects, digest)
    if finished is not None:
        return finished
    _remove_fragments(objects)
    for path in (info.path for info in objects.list() if info.path.startswith("partition-")):
        objects.delete(path)
    report = progress or (lambda _: None)
    try:
        shuffled = _shuffle(job, units, report)
        counts = _tokenise_all(job, shuffled.fragments, report)
    finally:
        _remove_fragments(objects)
    stats = PartitionStats(
        digest=digest, partitions=counts, label_counts=shuffled.label_counts, skipped=shuffled.skipped, split_column=shuffled.split_column
    )
    if stats.rows("train") == 0:
        raise DataError(f"no row of {settings.shown} is in the train split: check columns.split and the fractions")
    write_done(objects, stats)
    return stats


@dataclass
class _Shuffled:
    """The first pass over all units."""

    fragments: list[Fragment]
    label_counts: dict[SplitName, dict[str, int]]
    skipped: dict[str, int]
    split_column: bool


def _shuffle(job: PartitionJob, units: list[ReadUnit], report: Callable[[PartitionProgress], None]) -> _Shuffled:
    """Run the first pass. Raises DataError for bad rows, sources that disagree about splits, and no rows at all."""
    fragments: list[Fragment] = []
    labels: dict[SplitName, Counter[str]] = {split: Counter() for split in SPLITS}
    skipped: Counter[str] = Counter()
    bad: list[tuple[int, BadRow]] = []
    with_split: dict[bool, str] = {}
    rows = 0
    items = [json.dumps({"index": index, "unit": unit.model_dump()}) for index, unit in enumerate(units)]
    for done, line in enumerate(_run(lambda item: fragment_unit(job, item), items), start=1):
        result = UnitResult.model_validate_json(line)
        if result.error is not None:
            raise DataError(result.error)
        rows += result.rows
        skipped.update(result.skipped)
        add_labels(labels, {str(split): counts for split, counts in result.label_counts.items()})
        fragments += [Fragment(path, np.array(offsets, np.int64)) for path, offsets in result.fragments]
        bad += [(result.unit, BadRow(*row)) for row in result.bad_rows]
        if len(bad) >= BAD_ROWS_SHOWN:
            break
        if result.has_split is not None:
            with_split.setdefault(result.has_split, units[result.unit].shown)
        report(PartitionProgress("read", done, len(units), rows))
    if bad:
        raise DataError(_describe_bad_rows(bad))
    if len(with_split) == 2:
        raise DataError(f"{with_split[True]} has a split column, {with_split[False]} has none: give it in all or set columns.split: null")
    if rows == 0:
        left_out = "".join(f"; {count} rows: {reason}" for reason, count in skipped.most_common(3))
        raise DataError(f"no usable row in {job.settings.shown}: check data.source and data.filter{left_out}")
    counted = {split: dict(sorted(counts.items())) for split, counts in labels.items()}
    return _Shuffled(fragments, counted, dict(sorted(skipped.items())), True in with_split)


def _tokenise_all(job: PartitionJob, fragments: list[Fragment], report: Callable[[PartitionProgress], None]) -> list[PartitionCounts]:
    """Run the second pass; returns the counts in the order of the partitions."""
    items = []
    for partition in range(job.partitions):
        pieces = [piece for fragment in fragments if (piece := fragment.piece(partition))]
        items.append(json.dumps({"partition": partition, "pieces": [[piece.path, piece.start, piece.stop] for piece in pieces]}))
    counts: dict[int, PartitionCounts] = {}
    rows = 0
    for line in _run(lambda item: finish_partition(job, item), items):
        result = PartitionResult.model_validate_json(line)
        if result.counts is None:
            raise DataError(result.error or f"partition {result.partition} could not be written")
        counts[result.partition] = result.counts
        rows += sum(result.counts.rows.values())
        report(PartitionProgress("tokenise", len(counts), len(items), rows))
    return [counts[partition] for partition in sorted(counts)]


def _run(function: Callable[[str], str], items: list[str]) -> Iterator[str]:
    """Apply `function` to every item, one task each, on the cluster; yields results as they come, in any order."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # its plans and summaries are noise beside the job's own progress
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False  # progress is reported in users and rows, and standard output belongs to the caller
    with ray.data.DataContext.current(context):
        tasks = ray.data.from_items([{"item": item} for item in items], override_num_blocks=len(items))
        results = tasks.map(lambda row: {"result": function(row["item"])})
    for row in results.iter_rows():
        yield str(row["result"])


def _digest(job: PartitionJob, units: list[ReadUnit]) -> str:
    """What the partitions depend on. Keyed with the secret, for another secret means other user keys."""
    tokenizer = load_tokenizer(job.tokenizer_path)
    vocabulary = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    vocabulary_digest = hashlib.blake2b(vocabulary.encode("utf-8"), digest_size=16).hexdigest()
    identity = json.dumps([fingerprint(job.settings, units), job.task, job.partitions, vocabulary_digest, job.max_length])
    return hashlib.blake2b(identity.encode("utf-8"), key=job.secret, digest_size=16).hexdigest()


def _remove_fragments(objects: ObjectStore) -> None:
    """Remove this attempt's fragments, or those that an earlier one left behind."""
    for folder in objects.folders():
        if folder.startswith("fragments-"):
            objects.delete_folder(folder)


def _describe_bad_rows(bad: list[tuple[int, BadRow]]) -> str:
    first = [str(row) for _, row in sorted(bad, key=lambda found: (found[0], found[1].row))[:BAD_ROWS_SHOWN]]
    return "\n".join([f"bad rows ({len(first)} shown): correct them, or leave them out with data.on_bad_row: skip", *first])
