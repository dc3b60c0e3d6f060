"""Where rows come from: the units a source divides into, and the reading of one unit.

A unit (a parquet row group, a file, a dataset's shard, a range of synthetic users) is what one task reads, on any machine.
This file knows which kinds of sources there are, and the mapping of columns; it doesn't judge rows and knows nothing of Ray.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import zlib
from collections.abc import Iterator

import pyarrow as pa  # type: ignore[import-untyped]

from plora_ray.data.files import file_records, file_units
from plora_ray.data.formats import COMPRESSIONS, Records
from plora_ray.data.huggingface import HuggingFaceName, hugging_face_records, hugging_face_splits, hugging_face_units
from plora_ray.data.lamp import LAMP, lamp_records, lamp_units
from plora_ray.data.locations import shown_location
from plora_ray.data.paper import PAPER, paper_records, paper_units
from plora_ray.data.rows import BadRow, RawRows, RowProblem, class_label
from plora_ray.data.source_settings import ColumnMapping, SourceSettings
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
    return file_units(settings)


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
        yield from file_records(unit, settings, wanted)


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
