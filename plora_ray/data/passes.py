"""The two passes of partitioning as plain functions: a unit becomes fragments, a partition's pieces become its file.

Each function is one task: it takes and returns JSON lines, holds one fragment or one partition in memory, and may run twice
with the same result. Knows nothing of Ray: whatever applies a function to a list can run a pass.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from pydantic import BaseModel

from plora_ray.data.fragments import FragmentWriter, read_pieces
from plora_ray.data.rows import SPLITS, BadRow, RawRows, SplitName, Task
from plora_ray.data.source_settings import SourceSettings
from plora_ray.data.sources import read_unit
from plora_ray.data.stats import PartitionCounts, refuse_too_many_classes
from plora_ray.data.table import PartitionTable, as_partition, partition_schema, write_partition
from plora_ray.data.trained_users import TrainedUsers, trained_users, write_trained_users
from plora_ray.data.units import ReadUnit
from plora_ray.errors import ModelError, PloraError
from plora_ray.identity import partition_of, user_key
from plora_ray.store.objects import ObjectRange, ObjectStore
from plora_ray.store.retries import retrying

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BAD_ROWS_SHOWN = 20
TEXTS_PER_CALL = 4096  # to the tokenizer: bounds its Python lists and keeps token offsets within 32 bits


@dataclass(frozen=True)
class PartitionJob:
    """What every task needs. Holds secrets: it travels to the tasks inside a closure and is never printed or stored.

    destination: the folder of the partitions. fragments: the one in it for what lies between the passes.
    """

    settings: SourceSettings
    task: Task
    destination: ObjectStore
    fragments: str
    partitions: int
    tokenizer_path: str
    max_length: int
    secret: bytes = field(repr=False)


class UnitResult(BaseModel):
    """What the first pass says about a unit; `fragments` are (path, offsets of the partitions in it)."""

    unit: int
    rows: int = 0
    fragments: list[tuple[str, list[int]]] = []
    label_counts: dict[SplitName, dict[str, int]] = {}
    bad_rows: list[tuple[str, int, str]] = []
    skipped: dict[str, int] = {}
    has_split: bool | None = None  # None: no rows to tell
    error: str | None = None


class PartitionResult(BaseModel):
    """What the second pass says about a partition."""

    partition: int
    counts: PartitionCounts | None = None
    error: str | None = None


def fragment_unit(job: PartitionJob, item: str) -> str:
    """First pass, one unit: validate, key, split, and write fragments."""
    parsed = json.loads(item)
    unit, index = ReadUnit.model_validate(parsed["unit"]), int(parsed["index"])
    try:
        # From the start after a passing failure: rows come out of open files, and the same fragments are written again.
        return retrying(job.destination.retry_s)(_fragment, job, unit, index).model_dump_json()
    except PloraError as error:
        return UnitResult(unit=index, error=str(error)).model_dump_json()


def _fragment(job: PartitionJob, unit: ReadUnit, index: int) -> UnitResult:
    settings, rules, division = job.settings, job.settings.row_rules(job.task), job.settings.split_rules()
    writer = FragmentWriter(job.destination, job.fragments, index, job.task, job.partitions)
    result = UnitResult(unit=index)
    skipped: Counter[str] = Counter()
    labels: dict[SplitName, Counter[str]] = {split: Counter() for split in SPLITS}
    for raw in read_unit(unit, settings):
        result.has_split = _agreed(result.has_split, raw)
        for checked in rules.check(raw):
            if isinstance(checked, BadRow):
                skipped[checked.reason] += 1
                if settings.on_bad_row == "stop":
                    result.bad_rows.append((checked.file, checked.row, checked.reason))
                continue
            number, row = checked
            split = division.of(row)
            key = user_key(row.user_id, job.secret)
            writer.add(partition_of(key, job.partitions), key, number, row, split)
            result.rows += 1
            if isinstance(row.label, str):
                labels[split][row.label] += 1
        refuse_too_many_classes(len(labels["train"]))
        if len(result.bad_rows) >= BAD_ROWS_SHOWN:
            break
    if not result.bad_rows:  # else the job stops, and texts needn't be stored
        writer.flush()
    result.fragments = [(fragment.path, fragment.offsets.tolist()) for fragment in writer.fragments]
    result.label_counts = {split: dict(counts) for split, counts in labels.items()}
    result.skipped = dict(skipped)
    return result


def finish_partition(job: PartitionJob, item: str) -> str:
    """Second pass, one partition: sort by user, tokenise, write."""
    parsed = json.loads(item)
    result = PartitionResult(partition=int(parsed["partition"]))
    try:
        rows = read_pieces(job.destination, [ObjectRange(*piece) for piece in parsed["pieces"]], job.task)
        tokens = _tokenise(rows["text"], load_tokenizer(job.tokenizer_path), job.max_length)
        columns = [rows["key"], tokens, rows["label"], rows["split"], rows["timestamp"]]
        table = pa.table(columns, schema=partition_schema(job.task))
        write_partition(job.destination, result.partition, table)
        partition = as_partition(table)
        trained = trained_users(partition, job.secret)
        write_trained_users(job.destination, result.partition, trained)
        result.counts = _count(partition, trained)
    except PloraError as error:
        result.error = str(error)
    return result.model_dump_json()


def _tokenise(texts: pa.ChunkedArray, tokenizer: PreTrainedTokenizerBase, max_length: int) -> pa.ChunkedArray:
    """Token ids of each text, list<int32>, cut to `max_length` and not padded."""
    chunks, kind = [], partition_schema("classification").field("input_ids").type
    nothing = next((i for i in (tokenizer.unk_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) if i is not None), 0)
    for start in range(0, len(texts), TEXTS_PER_CALL):
        batch = texts.slice(start, TEXTS_PER_CALL).to_pylist()
        encoded = tokenizer(batch, truncation=True, max_length=max_length, padding=False, return_attention_mask=False)
        ids = [row or [nothing] for row in encoded["input_ids"]]  # a text without a single token still needs a position
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in ids])]).astype(np.int32)
        flat = np.concatenate([np.asarray(row, np.int32) for row in ids])
        chunks.append(pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat), type=kind))
    return pa.chunked_array(chunks, kind)


def _count(table: PartitionTable, trained: TrainedUsers) -> PartitionCounts:
    numbers = table.labels[table.split == SPLITS.index("train")] if table.labels.dtype.kind == "f" else np.empty(0)
    mean = float(numbers.mean()) if len(numbers) else 0.0
    by_split = np.bincount(table.split, minlength=len(SPLITS))
    return PartitionCounts(
        users=table.users,
        train_users=len(trained.keys),
        rows={name: int(count) for name, count in zip(SPLITS, by_split, strict=True)},
        tokens=len(table.tokens),
        label_mean=mean,
        label_squares=float(((numbers - mean) ** 2).sum()),
    )


@lru_cache(maxsize=1)
def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer, once a process. Raises ModelError."""
    from transformers import AutoTokenizer  # seconds to import; the first pass has no use for it

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"no tokenizer at {path!r}: {next(iter(str(error).splitlines()), type(error).__name__)}") from error
    return tokenizer


def _agreed(has_split: bool | None, raw: RawRows) -> bool | None:
    return has_split if not raw.numbers else raw.splits is not None
