"""Which split a row is in where its source doesn't say: by its text, or by its time."""

from __future__ import annotations

import hashlib
import html
import re
import unicodedata
from dataclasses import dataclass
from datetime import datetime

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from plora_ray.data.rows import Row, RowProblem, SplitName, canonical_timestamp

LEAST_SECONDS = 10**8  # smaller numbers are years, or dates without their dashes
_WORDS = re.compile(r"\w+")
# Tags, web addresses, who is spoken to: in ASCII, since other writing may go on without a space.
_TAG, _ADDRESS, _NAME = r"</?[a-z][a-z0-9]*(?:\s+[a-z-]+\s*=[^<>]*)?\s*/?>", r"(?:https?://|www\.)[!-~]+", r"(?<![\w.])@[a-z0-9_]+"
_MARKUP = re.compile(f"{_TAG}|{_ADDRESS}|{_NAME}", re.IGNORECASE | re.ASCII)


class SplitTimes(BaseModel):
    """Rows from `test` on are test rows, those from `validation` on and before it validation rows, all earlier ones train."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    test: datetime
    validation: datetime | None = None

    @field_validator("test", "validation", mode="before")
    @classmethod
    def _in_utc(cls, value: object) -> object:
        if isinstance(value, int | float) and abs(value) < LEAST_SECONDS:
            raise ValueError(f"{value} would be {value} seconds after 1970: write a date, such as 2016-01-01")
        try:
            return canonical_timestamp(value) if value is not None else None
        except RowProblem as problem:
            raise ValueError(str(problem)) from None

    @model_validator(mode="after")
    def _in_order(self) -> SplitTimes:
        if self.validation is not None and self.validation >= self.test:
            raise ValueError("validation must lie before test: train is the past, test the future")
        return self


@dataclass(frozen=True)
class SplitRules:
    """Fractions of the texts, drawn by their hash and `seed`; or, with `times`, what came when."""

    seed: int
    validation_fraction: float
    test_fraction: float
    times: SplitTimes | None = None

    def of(self, row: Row) -> SplitName:
        """The row's split: its own, if the source gave one."""
        if row.split is not None:
            return row.split
        if self.times is None:
            return split_by_text(row.text, self.seed, self.validation_fraction, self.test_fraction)
        assert row.timestamp is not None  # RowRules refuses rows without one
        if row.timestamp >= self.times.test:
            return "test"
        return "validation" if self.times.validation is not None and row.timestamp >= self.times.validation else "train"


def split_by_text(text: str, seed: int, validation_fraction: float, test_fraction: float) -> SplitName:
    """The split of a text by a hash of its words and `seed`: texts that differ only in what `hash_of_words` leaves out stay together."""
    share = hash_of_words(text, seed) / 2**64
    if share < test_fraction:
        return "test"
    return "validation" if share < test_fraction + validation_fraction else "train"


def hash_of_words(text: str, seed: int) -> int:
    """64 bits, the same for texts that differ only in case, spaces, punctuation, markup, web addresses, @names or Unicode's forms."""
    plain = unicodedata.normalize("NFKC", _MARKUP.sub(" ", html.unescape(text))).casefold()
    words = " ".join(_WORDS.findall(plain)) or text
    digest = hashlib.blake2b(words.encode("utf-8"), key=seed.to_bytes(8, "big", signed=True), digest_size=8).digest()
    return int.from_bytes(digest, "big")
