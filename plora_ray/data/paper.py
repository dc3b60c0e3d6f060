"""The paper's benchmarks as a source: IMDB, YELP, GDRD and PPR in the layout that the released code reads (yoyo-yun/PLoRA, dataset/).

    paper://imdb/path/to/corpus      below it imdb2/a/train-a.tsv, dev-a.tsv, test-a.tsv and the same for b

Columns: user_id, text, label (from 1), item_id (the product), split, and cohort: a, users known in training; b, cold ones, for few- and
zero-shot. This file knows those files and nothing of what is done with their rows.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from plora_ray.data.formats import MAX_CSV_FIELD_CHARS, ROWS_PER_CHUNK, Records
from plora_ray.data.units import ReadUnit
from plora_ray.errors import DataError

PAPER = "paper://"
COLUMNS = ("user_id", "item_id", "label", "text", "split", "cohort")
COHORTS, PARTS = ("a", "b"), ("train", "dev", "test")
SENTENCE_END = "<sssss>"
HOME = "https://github.com/yoyo-yun/PLoRA"


@dataclass(frozen=True)
class PaperSet:
    """Where a set's files lie and how a line is written. tabs: between fields. header: whether the first line names the columns."""

    folder: str
    file: str
    tabs: int
    header: bool

    def path(self, cohort: str, part: str) -> Path:
        """The file of a cohort and part, below the corpus."""
        return Path(self.folder, cohort, self.file.format(part=part, cohort=cohort, COHORT=cohort.upper()))


SETS = {
    "imdb": PaperSet("imdb2", "{part}-{cohort}.tsv", tabs=2, header=False),
    "yelp": PaperSet("yelp2", "{part}-{cohort}.tsv", tabs=2, header=False),
    "gdrd": PaperSet("gdrd", "goodreads_{part}_{COHORT}.tsv", tabs=1, header=True),
    "ppr": PaperSet("ppr", "ppr_{part}_{COHORT}.tsv", tabs=1, header=True),
}


def paper_units(url: str) -> list[ReadUnit]:
    """One unit a file, six in all. Raises DataError, saying where to get the set, if one of them is missing."""
    name, corpus = _parse(url)
    units = []
    for cohort in COHORTS:
        for part in PARTS:
            file = corpus / SETS[name].path(cohort, part)
            if not file.is_file():
                raise DataError(f"{url}: {file} is missing: download the set as {HOME} says and unpack it below {corpus}")
            status = file.stat()
            place, version = f"{PAPER}{name}{corpus}#{cohort}/{part}", str(status.st_mtime_ns)
            units.append(ReadUnit(kind="paper", file=place, first=1, size_bytes=status.st_size, version=version))
    return units


def paper_records(unit: ReadUnit) -> Iterator[Records]:
    """The rows of one file, a few thousand at a time."""
    url, _, place = unit.file.partition("#")
    cohort, part = place.split("/")
    name, corpus = _parse(url)
    chunk = Records.empty(COLUMNS)
    for number, line in _lines(SETS[name], corpus / SETS[name].path(cohort, part)):
        if len(line) != 4:
            chunk.malformed.append((number, f"has {len(line)} fields where user, product, label and text are expected"))
        else:
            chunk.numbers.append(number)
            user, item, label, text = line
            for column, value in zip(COLUMNS, (user, item, label, text.replace(SENTENCE_END, " "), part, cohort), strict=True):
                chunk.columns[column].append(value)
        if len(chunk.numbers) + len(chunk.malformed) >= ROWS_PER_CHUNK:
            yield chunk
            chunk = Records.empty(COLUMNS)
    yield chunk


def _lines(layout: PaperSet, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and fields; blank lines are left out."""
    # Bytes that aren't UTF-8 become lone surrogates, which the validation of the row reports with its line.
    with path.open(encoding="utf-8", errors="surrogateescape", newline="" if layout.header else None) as stream:
        if layout.header:
            csv.field_size_limit(MAX_CSV_FIELD_CHARS)
            reader = csv.reader(stream, delimiter="\t")
            next(reader, None)
            yield from ((reader.line_num, fields) for fields in reader if fields)
            return
        separator = "\t" * layout.tabs
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield number, [field.strip() for field in line.rstrip("\n").split(separator, 3)]


def _parse(url: str) -> tuple[str, Path]:
    """The set's name and the corpus folder. Raises DataError for anything else."""
    name, slash, corpus = url.removeprefix(PAPER).partition("/")
    if name not in SETS or not slash or not corpus:
        raise DataError(f"{url!r} names no benchmark of the paper: write {PAPER}NAME/path/to/corpus, NAME one of {', '.join(SETS)}")
    return name, Path(f"/{corpus}")
