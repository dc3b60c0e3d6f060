"""Data files on any file system that fsspec knows: which there are, what one task reads of each, and its records."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import fsspec  # type: ignore[import-untyped]
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from plora_ray.data.formats import EXTENSIONS, Records, csv_records, format_of, is_data_file, json_records, parquet_records
from plora_ray.data.locations import shown_location
from plora_ray.data.source_settings import SourceSettings
from plora_ray.data.units import ReadUnit
from plora_ray.errors import DataError

FOOTER_THREADS = 16  # listing is bound by the latency of small reads


def file_units(settings: SourceSettings) -> list[ReadUnit]:
    """The units of all data files at the source's path, directory or glob, in the order of their names; at least one.

    Raises DataError if nothing is there, or a format or column isn't as needed.
    """
    files, fs = _list_files(settings)
    with ThreadPoolExecutor(FOOTER_THREADS) as threads:
        return [unit for units in threads.map(lambda file: _units_of_file(fs, file, settings), files) for unit in units]


def file_records(unit: ReadUnit, settings: SourceSettings, wanted: frozenset[str]) -> Iterator[Records]:
    """The records of one unit, `wanted` columns only where the format can leave out others."""
    fs, path = fsspec.core.url_to_fs(unit.file, **settings.storage_options)
    compression = None if unit.kind == "parquet" else "infer"
    with fs.open(path, "rb", compression=compression) as stream:
        if unit.kind == "parquet":
            yield from parquet_records(stream, unit.part, unit.first, wanted)
        else:
            yield from (csv_records if unit.kind == "csv" else json_records)(stream, wanted)


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
            raise DataError(f"{settings.shown} doesn't exist: name a file, directory, glob or URL that does")
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
