"""One unit of a table through an engine, into parquet files of bounded size. Knows rows and an engine; no Ray, no HTTP.

file, row        where the row stood in the source; row counts from 1
user_id          as it was given
label            the class's name, or the value of a regression
scores           a probability for every class; a regression has none
personalization  adapter or population; reason: why the population, if the store couldn't tell or the guard left the user to it
generation       that answered
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from io import BytesIO
from itertools import islice

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from torch import Tensor

from plora_ray.data.rows import BadRow, Row, RowRules
from plora_ray.data.source_settings import SourceSettings
from plora_ray.data.sources import read_unit
from plora_ray.data.units import ReadUnit
from plora_ray.errors import DataError
from plora_ray.inference import Answer, InferenceEngine
from plora_ray.inference.engine import PendingAnswers
from plora_ray.store import ObjectStore

ROWS_PER_PART = 50_000
ROWS_AT_ONCE = 1024  # in the engine's queue, twice: while some are computed the next are tokenised
BAD_ROWS_SHOWN = 20


@dataclass(frozen=True)
class UnitScored:
    """What became of a unit's rows. personal: those that the user's own adapter answered; skipped: bad ones."""

    rows: int
    personal: int
    skipped: int
    parts: int


NumberedRow = tuple[int, Row]


def score_unit(number: int, unit: ReadUnit, source: SourceSettings, engine: InferenceEngine, output: ObjectStore) -> UnitScored:
    """Answer all rows of unit `number` and write them as `part-{number}-{piece}.parquet`; written again, the files are the same.

    Raises DataError for an unreadable unit and, unless the source says to skip them, for bad rows; StoreError for the output.
    """
    rows = _Rows(unit, source)
    total = personal = parts = 0
    answered = _answers(iter(rows), engine)
    while piece := list(islice(answered, ROWS_PER_PART)):
        output.write(f"part-{number:05d}-{parts:05d}.parquet", _encoded(unit.shown, piece, engine))
        total, parts = total + len(piece), parts + 1
        personal += sum(answer.personalization == "adapter" for _, answer in piece)
    return UnitScored(total, personal, rows.skipped, parts)


class _Rows:
    """The unit's good rows with their numbers. skipped: bad ones so far."""

    def __init__(self, unit: ReadUnit, source: SourceSettings) -> None:
        self._unit, self._source = unit, source
        self.skipped = 0

    def __iter__(self) -> Iterator[NumberedRow]:
        rules = RowRules("classification", self._source.max_text_chars)
        bad: list[BadRow] = []
        for raw in read_unit(self._unit, self._source):
            for checked in rules.check(raw):
                if not isinstance(checked, BadRow):
                    yield checked
                    continue
                self.skipped += 1
                if self._source.on_bad_row == "stop":
                    bad.append(checked)
                    if len(bad) == BAD_ROWS_SHOWN:
                        raise _bad_rows(bad)
        if bad:
            raise _bad_rows(bad)


def _bad_rows(bad: list[BadRow]) -> DataError:
    shown = "; ".join(str(row) for row in bad)
    return DataError(f"bad rows ({len(bad)} shown): correct them, or leave them out with data.on_bad_row: skip: {shown}")


def _answers(rows: Iterator[NumberedRow], engine: InferenceEngine) -> Iterator[tuple[NumberedRow, Answer]]:
    """Each row with its answer, in order."""
    waiting: list[tuple[list[NumberedRow], PendingAnswers]] = []
    while some := list(islice(rows, ROWS_AT_ONCE)):
        waiting.append((some, engine.submit([(row.user_id, row.text) for _, row in some])))
        if len(waiting) == 2:
            yield from _finished(*waiting.pop(0), engine)
    for ended in waiting:
        yield from _finished(*ended, engine)


def _finished(rows: list[NumberedRow], pending: PendingAnswers, engine: InferenceEngine) -> Iterator[tuple[NumberedRow, Answer]]:
    logits: list[Future[Tensor]] = pending.logits
    return zip(rows, engine.finish(pending, [future.result() for future in logits]), strict=True)


def _encoded(file: str, piece: list[tuple[NumberedRow, Answer]], engine: InferenceEngine) -> bytes:
    labels = engine.loaded.labels
    answers = [answer for _, answer in piece]
    columns = {
        "file": pa.array([file] * len(piece), pa.string()).dictionary_encode(),
        "row": pa.array([number for (number, _), _ in piece], pa.int64()),
        "user_id": pa.array([row.user_id for (_, row), _ in piece], pa.string()),
        "label": pa.array([answer.prediction.label for answer in answers], pa.float64() if labels.task == "regression" else pa.string()),
        "personalization": pa.array([answer.personalization for answer in answers], pa.string()),
        "reason": pa.array([answer.reason for answer in answers], pa.string()),
        "generation": pa.array([answer.generation for answer in answers], pa.string()),
    }
    if labels.task == "classification":
        fields = pa.struct([(name, pa.float64()) for name in labels.classes])
        columns["scores"] = pa.array([answer.prediction.scores for answer in answers], fields)
    encoded = BytesIO()
    pq.write_table(pa.table(columns), encoded, compression="zstd")
    return encoded.getvalue()
