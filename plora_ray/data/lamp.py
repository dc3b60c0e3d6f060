"""LaMP's tasks that have labels as a source: LaMP-2 (a news article's category, or a film's tag) and LaMP-3 (a review's rating).

    lamp:///path/to/LaMP_3      in it train_questions.json, train_outputs.json, dev_questions.json, dev_outputs.json

The layout is that of the benchmark's user-based separation (Salemi et al., ACL 2024, arXiv 2304.11406): a question is one user, with a
`profile` of texts that the user labelled, and an `input` whose label the outputs hold; the parts have no user in common. Profiles are
training rows; the question is a validation row in the train part and a test row in the dev part.

Columns: user_id (the part and the question's id), text, label, split, and cohort: a, the users of the train part; b, those of the dev
part, for few- and zero-shot. This file knows those files and nothing of what is done with their rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from plora_ray.data.formats import READ_BUFFER_BYTES, ROWS_PER_CHUNK, Records
from plora_ray.data.units import ReadUnit
from plora_ray.errors import DataError

LAMP = "lamp://"
QUESTIONS_LOOKED_AT = 100  # to see which task it is
COLUMNS = ("user_id", "text", "label", "split", "cohort")
PARTS = {"train": ("validation", "a"), "dev": ("test", "b")}
BETWEEN = frozenset(", \t\r\n")
HOME = "https://lamp-benchmark.github.io/download"


@dataclass(frozen=True)
class LampTask:
    """How a task is written: the profile's fields with label and text, and what stands in front of the text in a question."""

    label: str
    text: str
    marker: str


TASKS = (
    LampTask("tag", "description", " description: "),
    LampTask("category", "text", " article: "),
    LampTask("score", "text", " review: "),
)


class _Malformed(ValueError):
    """What a question lacks."""


def lamp_units(url: str) -> list[ReadUnit]:
    """One unit a part. Raises DataError, saying where to get the task, if a file is missing, or if the task has no labels."""
    units = []
    for part in PARTS:
        questions, outputs = _files(url, part)
        if not any(_task_of(question) for question in islice(_elements(questions), QUESTIONS_LOOKED_AT)):
            raise DataError(f"{questions} has no profiles with tag, category or score: of LaMP's tasks only LaMP-2 and LaMP-3 have labels")
        versions = "-".join(str(file.stat().st_mtime_ns) for file in (questions, outputs))
        units.append(ReadUnit(kind="lamp", file=f"{url}#{part}", first=1, size_bytes=questions.stat().st_size, version=versions))
    return units


def lamp_records(unit: ReadUnit) -> Iterator[Records]:
    """The rows of one part, a few thousand at a time; a record's number is its question's, from 1."""
    url, _, part = unit.file.partition("#")
    questions, outputs = _files(url, part)
    golds = _golds(outputs)
    chunk = Records.empty(COLUMNS)
    for number, question in enumerate(_elements(questions), start=1):
        try:
            rows = _rows(question, golds, part)
        except _Malformed as error:
            chunk.malformed.append((number, str(error)))
            rows = []
        for row in rows:
            chunk.numbers.append(number)
            for column, value in zip(COLUMNS, row, strict=True):
                chunk.columns[column].append(value)
        if len(chunk.numbers) + len(chunk.malformed) >= ROWS_PER_CHUNK:
            yield chunk
            chunk = Records.empty(COLUMNS)
    yield chunk


def _rows(question: Any, golds: dict[str, object], part: str) -> list[tuple[object, ...]]:
    """A user's rows in the order of COLUMNS: the profile, then the question itself. Raises _Malformed."""
    task = _task_of(question)
    if task is None or not isinstance(question.get("input"), str):
        raise _Malformed("has no id, no input, or no profile with tag, category or score")
    name = str(question["id"])
    if name not in golds:
        raise _Malformed(f"has no output in {part}_outputs.json")
    _, marker, text = question["input"].partition(task.marker)
    if not marker:
        raise _Malformed(f"has no {task.marker.strip()!r} in its input")
    split, cohort = PARTS[part]
    user = f"{part}-{name}"
    entries = [entry if isinstance(entry, dict) else {} for entry in question["profile"]]
    labelled = [(entry.get(task.text), entry.get(task.label)) for entry in entries]
    return [*((user, *pair, "train", cohort) for pair in labelled), (user, text, golds[name], split, cohort)]


def _task_of(question: Any) -> LampTask | None:
    """The task whose label the question's profile has."""
    profile = question.get("profile") if isinstance(question, dict) and "id" in question else None
    first = profile[0] if isinstance(profile, list) and profile else None
    return next((task for task in TASKS if isinstance(first, dict) and task.label in first), None)


def _golds(path: Path) -> dict[str, object]:
    try:
        return {str(gold["id"]): gold["output"] for gold in json.loads(path.read_text(encoding="utf-8"))["golds"]}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f'{path} is not what LaMP has there, {{"golds": [{{"id": ..., "output": ...}}, ...]}}') from error


def _elements(path: Path) -> Iterator[Any]:
    """The elements of a JSON array of objects, one at a time: profiles make the files larger than memory may be."""
    decoder = json.JSONDecoder()
    with path.open(encoding="utf-8") as stream:
        read = stream.read(READ_BUFFER_BYTES).lstrip()
        if not read.startswith("["):
            raise DataError(f"{path} is no JSON array of questions")
        place = 1
        while True:
            place = _skipped(read, place)
            if read.startswith("]", place):
                return
            try:
                element, place = decoder.raw_decode(read, place)
            except ValueError as error:
                more = stream.read(max(READ_BUFFER_BYTES, len(read) - place))
                if not more:
                    raise DataError(f"{path} is not whole: it ends, or is no JSON, within a question") from error
                read, place = read[place:] + more, 0
                continue
            yield element


def _skipped(read: str, place: int) -> int:
    """Where the next element begins: behind comma and white space."""
    while read[place : place + 1] in BETWEEN:
        place += 1
    return place


def _files(url: str, part: str) -> tuple[Path, Path]:
    """Questions and outputs of a part, in the folder itself or one named as the part."""
    folder = Path(f"/{url.removeprefix(LAMP).strip('/')}")
    for place in (folder / part, folder):
        questions, outputs = (place / f"{part}_{kind}.json" for kind in ("questions", "outputs"))
        if questions.is_file() and outputs.is_file():
            return questions, outputs
    raise DataError(f"{url}: {questions} or {outputs.name} is missing: download the user-based separation from {HOME}")
