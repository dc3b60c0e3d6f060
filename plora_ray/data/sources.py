"""Where rows come from: settings, the units a source divides into, and the reading of one unit.

A unit (a parquet row group, a file, a dataset's shard, a range of synthetic users) is what one task reads, on any machine.
This file knows locations, formats by name and the mapping of columns; it doesn't judge rows and knows nothing of Ray.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import fsspec  # type: ignore[import-untyped]
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from pydantic import BaseModel, ConfigDict, Field, model_validator

from plora_ray.data.formats import COMPRESSIONS, EXTENSIONS, Records, csv_records, format_of, is_data_file, json_records, parquet_records
from plora_ray.data.huggingface import HuggingFaceName, hugging_face_records, hugging_face_splits, hugging_face_units
from plora_ray.data.lamp import LAMP, lamp_records, lamp_units
from plora_ray.data.locations import holds_credentials, shown_location
from plora_ray.data.paper import PAPER, paper_records, paper_units
from plora_ray.data.rows import BadRow, RawRows, RowProblem, RowRules, Task, class_label
from plora_ray.data.splits import SplitRules, SplitTimes
from plora_ray.data.synthetic import SyntheticParams, rows_of_user
from plora_ray.data.units import ReadUnit
from plora_ray.errors import DataError

SYNTHETIC_USERS_PER_UNIT = 2000
ROWS_PER_PARTITION = 32_768
BYTES_PER_PARTITION = 64 * 2**20
ASSUMED_BYTES_PER_ROW = 128  # of CSV and JSON lines
ASSUMED_COMPRESSION = 5
ASSUMED_ROWS_PER_SHARD = 2 * ROWS_PER_PARTITION  # a Hugging Face dataset doesn't tell
LEAST_PARTITIONS, MOST_PARTITIONS = 8, 65_536
FOOTER_THREADS = 16  # listing is bound by the latency of small reads


class ColumnMapping(BaseModel):
    """What the source calls its columns. `timestamp` and `split` may be absent under their default names, or null: not used.

    group: a column of few values by which evaluations report, such as country or age; it is used for nothing else.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    user_id: str = "user_id"
    text: str = "text"
    label: str = "label"
    timestamp: str | None = "timestamp"
    split: str | None = "split"
    group: str | None = None

    def resolve(self, available: tuple[str, ...], file: str) -> ColumnMapping:
        """Return the mapping with absent optional columns set to None. Raises DataError naming the columns that exist."""
        required = {"user_id": self.user_id, "text": self.text, "label": self.label}
        # A name that differs from the default was chosen by somebody: its absence is a typing error, not an option.
        required |= {role: name for role, name in self.optional().items() if name != role or role == "group"}
        missing = [f"{name!r} (columns.{role})" for role, name in required.items() if name not in available]
        if missing:
            raise DataError(f"{file} has no column {', '.join(missing)}; it has: {', '.join(available) or 'none'}")
        return self.model_copy(update={role: None for role, name in self.optional().items() if name not in available})

    def optional(self) -> dict[str, str]:
        """The optional roles in use and their column names."""
        named = {"timestamp": self.timestamp, "split": self.split, "group": self.group}
        return {role: name for role, name in named.items() if name is not None}


class SourceSettings(BaseModel):
    """The settings under `data:`. Only rows whose columns equal all of `filter` are kept.

    The fractions divide the texts when the source has no split column; `split_times` divides the rows by their timestamps instead,
    whatever a split column says. `storage_options` go to the file system (fsspec).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = "synthetic://"
    columns: ColumnMapping = Field(default_factory=ColumnMapping)
    filter: dict[str, str | bool | int | float] = Field(default_factory=dict)
    on_bad_row: Literal["stop", "skip"] = "stop"
    validation_fraction: float = Field(0.1, ge=0, lt=1)
    test_fraction: float = Field(0.1, ge=0, lt=1)
    split_times: SplitTimes | None = None
    max_text_chars: int = Field(20_000, ge=1)
    storage_options: dict[str, Any] = Field(default_factory=dict, repr=False)

    @model_validator(mode="after")
    def _no_password(self) -> SourceSettings:
        if holds_credentials(self.source):
            raise ValueError(
                "source holds a user name or password: put them into data.storage_options (username, password, client_kwargs, ... "
                "as the file system names them) or into the environment"
            )
        return self

    @model_validator(mode="after")
    def _leave_rows_to_train_on(self) -> SourceSettings:
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError("validation_fraction + test_fraction must be below 1: nothing would be left to train on")
        return self

    @property
    def shown(self) -> str:
        """The source as people may see it."""
        return shown_location(self.source)

    def row_rules(self, task: Task) -> RowRules:
        """What its rows must satisfy."""
        return RowRules(task, self.max_text_chars, dated=self.split_times is not None)

    def split_rules(self, seed: int) -> SplitRules:
        """How its rows are divided where it doesn't say so itself."""
        return SplitRules(seed, self.validation_fraction, self.test_fraction, self.split_times)


def list_units(settings: SourceSettings) -> list[ReadUnit]:
    """Return the units of the source in a stable order; at least one.

    Raises DataError if nothing is there, or a format or column isn't as needed.
    """
    if settings.source.startswith("synthetic:"):
        params = SyntheticParams.from_url(settings.source)
        firsts = range(0, params.users, SYNTHETIC_USERS_PER_UNIT)
        return [
            ReadUnit(kind="synthetic", file=settings.source, first=first, count=count, rows=count * params.texts)
            for first in firsts
            for count in (min(SYNTHETIC_USERS_PER_UNIT, params.users - first),)
        ]
    if settings.source.startswith("hf://"):
        return hugging_face_units(settings.source)
    if settings.source.startswith(PAPER):
        return paper_units(settings.source)
    if settings.source.startswith(LAMP):
        return lamp_units(settings.source)
    files, fs = _list_files(settings)
    with ThreadPoolExecutor(FOOTER_THREADS) as threads:
        return [unit for units in threads.map(lambda file: _units_of_file(fs, file, settings), files) for unit in units]


def read_unit(unit: ReadUnit, settings: SourceSettings) -> Iterator[RawRows]:
    """Yield the unit's rows in chunks of a few thousand, mapped and filtered but not validated.

    Raises DataError if a column is missing or the file can't be read.
    """
    mapping: ColumnMapping | None = None
    try:
        for records in _records(unit, settings):
            if records.available:  # JSON lines without a single object have no columns to speak of
                if mapping is None:
                    mapping = settings.columns.resolve(records.available, unit.shown)
                    _require_filter_columns(settings, records, unit.shown)
                _refuse_late_columns(settings.columns, mapping, records, unit.shown)
            yield _mapped(records, mapping or settings.columns, settings, unit)
    except (OSError, EOFError, zlib.error, csv.Error, pa.ArrowException) as error:
        reason = shown_location(next(iter(str(error).splitlines()), type(error).__name__))
        raise DataError(f"{unit.shown} can't be read: {reason}") from error


def suggest_partitions(units: list[ReadUnit]) -> int:
    """How many partitions keep each within what a task holds easily: they grow with the source, so that memory needn't.

    The same for the same source, whatever the cluster. Rows are taken from the units, or estimated from compressed or plain bytes.
    """
    rows = bytes_ = 0.0
    for unit in units:
        size = unit.size_bytes * (ASSUMED_COMPRESSION if unit.file.endswith(COMPRESSIONS) else 1)
        rows += unit.rows or size / ASSUMED_BYTES_PER_ROW or ASSUMED_ROWS_PER_SHARD
        bytes_ += size
    wanted = max(rows / ROWS_PER_PARTITION, bytes_ / BYTES_PER_PARTITION)
    return min(max(math.ceil(wanted), LEAST_PARTITIONS), MOST_PARTITIONS)


def fingerprint(settings: SourceSettings, units: list[ReadUnit]) -> str:
    """Return 32 hex digits that change with the source's files, their versions, or a setting that changes the rows."""
    chosen = settings.model_dump(mode="json", exclude={"storage_options": True, "columns": {"group"}})
    identity = json.dumps([chosen, [unit.model_dump(mode="json") for unit in units]], sort_keys=True)
    return hashlib.blake2b(identity.encode("utf-8"), digest_size=16).hexdigest()


def _list_files(settings: SourceSettings) -> tuple[list[str], fsspec.AbstractFileSystem]:
    """The data files at the source's path, directory or glob, sorted; paths as the file system writes them."""
    try:
        fs, path = fsspec.core.url_to_fs(settings.source, **settings.storage_options)
        if fs.isfile(path):
            format_of(path)
            return [path], fs
        if fs.isdir(path):
            found = sorted(str(file) for file in fs.find(path))
            files = [file for file in found if is_data_file(file[len(path) :])]
            if not files:
                raise DataError(f"the directory {settings.shown} holds no data file ({', '.join(EXTENSIONS)})")
            return files, fs
        if not any(char in path for char in "*?["):
            raise DataError(f"{settings.shown} doesn't exist: set data.source to a file, directory, glob or URL")
        files = sorted(str(file) for file in fs.glob(path) if fs.isfile(file))
    except (OSError, ValueError, ImportError) as error:
        reason = shown_location(next(iter(str(error).splitlines()), type(error).__name__))
        raise DataError(f"data.source {settings.shown!r} can't be listed: {reason}") from error
    if not files:
        raise DataError(f"the glob {settings.shown} matches no file")
    for file in files:
        format_of(file)
    return files, fs


def _units_of_file(fs: fsspec.AbstractFileSystem, path: str, settings: SourceSettings) -> list[ReadUnit]:
    """One unit a parquet row group, or one for the whole file."""
    info, kind = fs.info(path), format_of(path)
    version = str(info.get("ETag") or info.get("mtime") or info.get("LastModified") or "")
    file = path if "file" in _protocols(fs) else fs.unstrip_protocol(path)
    whole = ReadUnit(kind=kind, file=file, first=1, size_bytes=int(info.get("size") or 0), version=version)
    if kind != "parquet":
        return [whole]
    try:
        with fs.open(path, "rb") as stream:
            metadata = pq.read_metadata(stream)
    except (OSError, pa.ArrowException) as error:
        reason = shown_location(next(iter(str(error).splitlines()), type(error).__name__))
        raise DataError(f"{whole.shown} is not a readable parquet file: {reason}") from error
    settings.columns.resolve(tuple(metadata.schema.to_arrow_schema().names), whole.shown)
    units, first = [], 1
    for group in range(metadata.num_row_groups):
        rows, size = metadata.row_group(group).num_rows, metadata.row_group(group).total_byte_size
        units.append(whole.model_copy(update={"part": group, "first": first, "rows": rows, "size_bytes": size}))
        first += rows
    return units


def _protocols(fs: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _records(unit: ReadUnit, settings: SourceSettings) -> Iterator[Records]:
    columns = settings.columns
    wanted = frozenset({columns.user_id, columns.text, columns.label, *columns.optional().values(), *settings.filter})
    if unit.kind == "synthetic":
        yield from _synthetic_records(unit)
    elif unit.kind == "paper":
        yield from paper_records(unit)
    elif unit.kind == "lamp":
        yield from lamp_records(unit)
    elif unit.kind == "hf":
        assert unit.split is not None  # set by _hugging_face_units
        chosen = HuggingFaceName.from_url(unit.file.partition("#")[0])
        yield from hugging_face_records(hugging_face_splits(chosen.name, chosen.config)[unit.split], unit.part, wanted)
    else:
        fs, path = fsspec.core.url_to_fs(unit.file, **settings.storage_options)
        compression = None if unit.kind == "parquet" else "infer"
        with fs.open(path, "rb", compression=compression) as stream:
            if unit.kind == "parquet":
                yield from parquet_records(stream, unit.part, unit.first, wanted)
            else:
                yield from (csv_records if unit.kind == "csv" else json_records)(stream, wanted)


def _synthetic_records(unit: ReadUnit) -> Iterator[Records]:
    params = SyntheticParams.from_url(unit.file)
    names = ("user_id", "text", "label", "split")
    for user in range(unit.first, unit.first + unit.count):
        rows = rows_of_user(params, user)
        first = user * params.texts + 1
        yield Records(names, list(range(first, first + len(rows))), {name: [getattr(row, name) for row in rows] for name in names})


def _require_filter_columns(settings: SourceSettings, records: Records, file: str) -> None:
    missing = [repr(name) for name in settings.filter if name not in records.available]
    if missing:
        raise DataError(f"{file} has no column {', '.join(missing)} (data.filter); it has: {', '.join(records.available) or 'none'}")


def _refuse_late_columns(asked: ColumnMapping, mapping: ColumnMapping, records: Records, file: str) -> None:
    """JSON lines may grow a column midway; rows before it were already read as having none."""
    for role, name in asked.optional().items():
        if getattr(mapping, role) is None and name in records.available:
            raise DataError(
                f"{file}:{records.numbers[0]}: column {name!r} begins in the middle of the file: "
                f"give it in every row or set columns.{role}: null"
            )


def _mapped(records: Records, mapping: ColumnMapping, settings: SourceSettings, unit: ReadUnit) -> RawRows:
    kept = list(range(len(records.numbers)))
    for name, value in settings.filter.items():
        wanted, column = class_label(value), records.columns.get(name)
        kept = [index for index in kept if column is not None and _comparable(column[index]) == wanted]

    def column_of(name: str | None) -> list[object] | None:
        if name is None:
            return None
        values = records.columns.get(name, [None] * len(records.numbers))
        return [values[index] for index in kept]

    user_ids, texts, labels = (column_of(name) or [] for name in (mapping.user_id, mapping.text, mapping.label))
    splits = None if settings.split_times else column_of(mapping.split)
    if splits is None and unit.names_split and not settings.split_times:
        splits = [unit.split] * len(kept)
    malformed = [BadRow(unit.shown, number, reason) for number, reason in records.malformed]
    numbers = [records.numbers[index] for index in kept]
    return RawRows(unit.shown, numbers, user_ids, texts, labels, splits, column_of(mapping.timestamp), column_of(mapping.group), malformed)


def _comparable(value: object) -> str | None:
    """A value as `filter` compares it: 3, 3.0 and "3" are equal, as label names are."""
    try:
        return class_label(value)
    except RowProblem:
        return None
