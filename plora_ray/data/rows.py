"""What a usable row is: validation and the canonical form of user ids, texts, labels, splits and timestamps.

This file knows one row at a time. It doesn't know where rows come from, which users they belong together with, or how they
are stored. Reasons for refusing a row never repeat its user id or text: they end up in logs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Literal

from plora_ray.errors import InvalidUserId
from plora_ray.identity import validate_user_id

Task = Literal["classification", "regression"]
SplitName = Literal["train", "validation", "test"]

SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
MOST_LABEL_CHARS = 1000
"""Index in this tuple = the int8 code stored in partition files."""
SPLIT_ALIASES: dict[str, SplitName] = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that can't be used: `row` counts from 1 (the line for JSON lines and CSV, the record elsewhere)."""

    file: str
    row: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.row}: {self.reason}"


@dataclass(frozen=True, slots=True)
class RawRows:
    """A few thousand rows as a file gave them, column by column, not yet validated.

    `numbers[i]` is the place of row i in `file`. `splits`, `timestamps` and `groups` are None where the source has no such column.
    `malformed` are the records between them that couldn't even be parsed.
    """

    file: str
    numbers: Sequence[int]
    user_ids: Sequence[object]
    texts: Sequence[object]
    labels: Sequence[object]
    splits: Sequence[object] | None = None
    timestamps: Sequence[object] | None = None
    groups: Sequence[object] | None = None
    malformed: Sequence[BadRow] = ()


@dataclass(frozen=True, slots=True)
class Row:
    """A valid row. `label` is a string for classification and a finite float for regression; `split`, `group` None = not given."""

    user_id: str
    text: str
    label: str | float
    split: SplitName | None
    timestamp: datetime | None
    group: str | None = None


class RowProblem(ValueError):
    """Why a row can't be used, in words that fit after `file:row:`."""


@dataclass(frozen=True, slots=True)
class RowRules:
    """What a row must satisfy for a task. dated: whether it needs a timestamp."""

    task: Task
    max_text_chars: int
    dated: bool = False

    def row(
        self, user_id: object, text: object, label: object, split: object | None, timestamp: object | None, group: object | None = None
    ) -> Row:
        """Return the canonical row; a `split`, `timestamp` or `group` of None counts as not given. Raises RowProblem."""
        row = Row(
            canonical_user_id(user_id),
            self.text(text),
            class_label(label) if self.task == "classification" else number_label(label),
            None if split is None else canonical_split(split),
            None if timestamp is None else canonical_timestamp(timestamp),
            None if group is None else (_group_name(group) or None),
        )
        if self.dated and row.timestamp is None:
            raise RowProblem("timestamp is missing, and split_times divides the rows by it")
        return row

    def text(self, text: object) -> str:
        """Return `text` unchanged if it can be tokenised. Raises RowProblem."""
        if text is None:
            raise RowProblem("text is missing")
        if not isinstance(text, str):
            raise RowProblem(f"text must be a string, got {type(text).__name__}")
        if not text.strip():
            raise RowProblem("text is blank")
        if len(text) > self.max_text_chars:
            raise RowProblem(f"text is longer than {self.max_text_chars} characters (max_text_chars)")
        if not _is_unicode(text):
            raise RowProblem("text is not valid Unicode")
        return text

    def check(self, raw: RawRows) -> Iterator[tuple[int, Row] | BadRow]:
        """Yield `(row number, row)` for each good row of `raw` and a BadRow for each other, malformed records first."""
        yield from raw.malformed
        for index, number in enumerate(raw.numbers):
            try:
                split = None
                if raw.splits is not None:
                    split = raw.splits[index]
                    if split is None:
                        raise RowProblem("split is missing although the source has a split column")
                timestamp = raw.timestamps[index] if raw.timestamps is not None else None
                group = raw.groups[index] if raw.groups is not None else None
                yield number, self.row(raw.user_ids[index], raw.texts[index], raw.labels[index], split, timestamp, group)
            except RowProblem as problem:
                yield BadRow(raw.file, number, str(problem))


def canonical_user_id(value: object) -> str:
    """Return the id as text; integers (parquet and JSON have them) become their decimal form. Raises RowProblem."""
    if value is None:
        raise RowProblem("user_id is missing")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    try:
        return validate_user_id(value)
    except InvalidUserId as error:
        raise RowProblem(str(error)) from None


def _group_name(value: object) -> str:
    name = str(value).strip()
    if not _is_unicode(name):
        raise RowProblem("group is not valid Unicode")
    return name


def _is_unicode(text: str) -> bool:
    """Whether no character is a lone surrogate, which is what bytes that aren't UTF-8 become on reading."""
    return text.isascii() or not any("\ud800" <= char <= "\udfff" for char in text)


def class_label(value: object) -> str:
    """Return the name of a class: True -> "1", 3 -> "3", 3.0 and "3.0" -> "3", other text stripped. Raises RowProblem.

    Text is treated like numbers because CSV has no types and spreadsheets write an integer column with gaps as floats.
    """
    if value is None:
        raise RowProblem("label is missing")
    if isinstance(value, bool | int):
        return str(int(value))
    if isinstance(value, float):
        if not math.isfinite(value):
            raise RowProblem("label is not finite")
        return str(int(value)) if value.is_integer() else repr(value)
    if not isinstance(value, str):
        raise RowProblem(f"label must be an integer, string or float, got {type(value).__name__}")
    name = value.strip()
    if not name:
        raise RowProblem("label is blank")
    if not _is_unicode(name):
        raise RowProblem("label is not valid Unicode")
    if len(name) > MOST_LABEL_CHARS:
        raise RowProblem(f"label has more than {MOST_LABEL_CHARS} characters: map columns.label to a column of classes")
    whole, point, zeros = name.partition(".")
    if point and zeros and not zeros.strip("0") and whole.isascii() and whole.removeprefix("-").isdigit():
        return str(int(whole))
    return name


def number_label(value: object) -> float:
    """Return the label of a regression as a finite float; decimal text is accepted (CSV). Raises RowProblem."""
    if value is None:
        raise RowProblem("label is missing")
    if not isinstance(value, bool | int | float | str):
        raise RowProblem(f"label must be a number for regression, got {type(value).__name__}")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise RowProblem("label is not a number: regression needs finite numbers, or set task: classification") from None
    if not math.isfinite(number):
        raise RowProblem("label is not finite")
    return number


def canonical_split(value: object) -> SplitName:
    """Return train, validation or test; `val`, `valid` and `dev` mean validation, case is ignored. Raises RowProblem."""
    split = SPLIT_ALIASES.get(value.strip().lower()) if isinstance(value, str) else None
    if split is None:
        raise RowProblem("split must be train, validation or test")
    return split


def canonical_timestamp(value: object) -> datetime | None:
    """Return the moment in UTC: dates, datetimes (naive = UTC), ISO 8601 text, or Unix seconds; blank = None.

    Raises RowProblem.
    """
    try:
        if isinstance(value, str):
            text = value.strip()
            if not text:
                return None
            value = float(text) if text.replace(".", "", 1).lstrip("-").isdigit() and len(text) > 8 else datetime.fromisoformat(text)
        if isinstance(value, datetime):
            return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
        if isinstance(value, date):
            return datetime(value.year, value.month, value.day, tzinfo=UTC)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return datetime.fromtimestamp(value, UTC)
    except (ValueError, OverflowError, OSError):
        pass
    raise RowProblem("timestamp is not a date, an ISO 8601 time or Unix seconds")
