"""How records are read out of parquet, CSV and JSON lines, a few thousand at a time.

Knows file formats and nothing about what the columns mean: no mapping, no validation. CSV and JSON lines are parsed by the
standard library because it tells the line of every record that can't be parsed, and never guesses types (a user "007" stays
"007").
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Literal

import pyarrow.parquet as pq  # type: ignore[import-untyped]

from plora_ray.data.locations import shown_location
from plora_ray.errors import DataError

FileFormat = Literal["parquet", "csv", "jsonl"]
EXTENSIONS: dict[str, FileFormat] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
}
COMPRESSIONS = (".gz", ".bz2", ".xz")  # of CSV and JSON lines; parquet compresses inside
ROWS_PER_CHUNK = 4096
READ_BUFFER_BYTES = 2**20
MAX_CSV_FIELD_CHARS = 16 * 2**20  # the standard library's 128 KiB is less than what max_text_chars may allow


def is_data_file(relative: str) -> bool:
    """Whether a path below a source directory counts: a known extension, and no part hidden or private (`.git`, `_logs`)."""
    parts = relative.strip("/").split("/")
    return not any(part.startswith((".", "_")) for part in parts) and _known_format(relative) is not None


def format_of(path: str) -> FileFormat:
    """The format that the extension names. Raises DataError for any other."""
    found = _known_format(path)
    if found is None:
        raise DataError(
            f"{shown_location(path)}: unknown extension; use {', '.join(EXTENSIONS)} (text formats also with {', '.join(COMPRESSIONS)})"
        )
    return found


def _known_format(path: str) -> FileFormat | None:
    bare = path.lower()
    for compression in COMPRESSIONS:
        bare = bare.removesuffix(compression)
    found = next((kind for extension, kind in EXTENSIONS.items() if bare.endswith(extension)), None)
    return None if found == "parquet" and bare != path.lower() else found


@dataclass(slots=True)
class Records:
    """A chunk of parsed records, column by column.

    `available` names the columns the chunk has in the source, read or not. `malformed` are (number, reason) of records
    that couldn't be parsed. Numbers count from 1.
    """

    available: tuple[str, ...]
    numbers: list[int] = field(default_factory=list)
    columns: dict[str, list[object]] = field(default_factory=dict)
    malformed: list[tuple[int, str]] = field(default_factory=list)

    @classmethod
    def empty(cls, columns: tuple[str, ...]) -> Records:
        """A chunk that has these columns and no record yet."""
        return cls(columns, columns={name: [] for name in columns})


def parquet_records(stream: IO[bytes], row_group: int, first_row: int, wanted: frozenset[str]) -> Iterator[Records]:
    """Read the wanted columns of one row group, whose first record is number `first_row` of the file."""
    parquet = pq.ParquetFile(stream, buffer_size=READ_BUFFER_BYTES)  # else whole column chunks of the row group are held
    available = tuple(parquet.schema_arrow.names)
    columns = [name for name in available if name in wanted]
    number = first_row
    for batch in parquet.iter_batches(ROWS_PER_CHUNK, row_groups=[row_group], columns=columns, use_threads=False):
        numbers = list(range(number, number + batch.num_rows))
        number += batch.num_rows
        yield Records(available, numbers, {name: batch.column(name).to_pylist() for name in columns})


def csv_records(stream: IO[bytes], wanted: frozenset[str]) -> Iterator[Records]:
    """Read comma-separated records below a header line; every value is text and a record's number is its first line."""
    csv.field_size_limit(MAX_CSV_FIELD_CHARS)
    # Bytes that aren't UTF-8 become lone surrogates, which the validation of the row reports with its line.
    reader = csv.reader(io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline=""))
    header = tuple(next(reader, ()))
    places = {name: place for place, name in enumerate(header) if name in wanted}
    chunk = Records(header, columns={name: [] for name in places})
    line = reader.line_num + 1
    while True:
        try:
            record = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            chunk.malformed.append((line, f"not valid CSV: {error}"))
        else:
            if len(record) == len(header):
                chunk.numbers.append(line)
                for name, place in places.items():
                    chunk.columns[name].append(record[place])
            elif record:
                chunk.malformed.append((line, f"has {len(record)} fields where the header has {len(header)}"))
        line = reader.line_num + 1
        if len(chunk.numbers) + len(chunk.malformed) >= ROWS_PER_CHUNK:
            yield chunk
            chunk = Records(header, columns={name: [] for name in places})
    yield chunk


def json_records(stream: IO[bytes], wanted: frozenset[str]) -> Iterator[Records]:
    """Read one JSON object a line; blank lines are skipped and a record's number is its line. A key may be absent."""
    objects: list[dict[str, object]] = []
    numbers: list[int] = []
    malformed: list[tuple[int, str]] = []

    def chunk() -> Records:
        available = tuple(dict.fromkeys(key for record in objects for key in record))
        columns = {name: [record.get(name) for record in objects] for name in available if name in wanted}
        return Records(available, list(numbers), columns, list(malformed))

    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            malformed.append((number, _json_reason(error)))
        else:
            if isinstance(record, dict):
                objects.append(record)
                numbers.append(number)
            else:
                malformed.append((number, "not a JSON object: write one {...} per line"))
        if len(objects) + len(malformed) >= ROWS_PER_CHUNK:
            yield chunk()
            objects, numbers, malformed = [], [], []
    yield chunk()


def _json_reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error.msg} at column {error.colno}"
    return "not valid UTF-8" if isinstance(error, UnicodeDecodeError) else "not valid JSON"
