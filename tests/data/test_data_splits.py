"""Which rows are held back: by text, so that nobody's test text is anybody's training text, or by time."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from plora_ray.config import parse_settings
from plora_ray.data.rows import BadRow, Row
from plora_ray.data.source_settings import SourceSettings
from plora_ray.data.sources import list_units, read_unit
from plora_ray.data.splits import hash_of_words, split_by_text
from plora_ray.errors import ConfigError

START = datetime(2020, 1, 1, tzinfo=UTC)


def test_texts_are_divided_by_their_hash_in_the_asked_shares() -> None:
    splits = [split_by_text(f"text {i}", seed=1, validation_fraction=0.1, test_fraction=0.2) for i in range(5000)]
    assert abs(splits.count("test") / 5000 - 0.2) < 0.02 and abs(splits.count("validation") / 5000 - 0.1) < 0.02
    assert splits != [split_by_text(f"text {i}", seed=2, validation_fraction=0.1, test_fraction=0.2) for i in range(5000)]


@given(st.lists(st.from_regex(r"[a-zäöß0-9]{1,6}", fullmatch=True), min_size=1, max_size=6), st.sampled_from([" ", "  ", ", ", "\n"]))
def test_texts_that_differ_only_in_case_spaces_or_punctuation_stay_together(words: list[str], between: str) -> None:
    def split(text: str) -> str:
        return split_by_text(text, seed=3, validation_fraction=0.3, test_fraction=0.3)

    assert split(between.join(words)) == split("  " + " ".join(words) + "!") == split(" ".join(words).capitalize())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("caf\u00e9 cr\u00e8me", "cafe\u0301 cre\u0300me"),
        ("\uff26\uff35\uff2c\uff2c width", "full width"),
        ("it&#39;s &quot;fine&quot;", "it's fine"),
        ("a line<br />and another", "a line and another"),
        ("look at this https://example.org/a?b=1", "look at this http://example.net/c"),
        ("@somebody that is wrong", "@another that is wrong"),
    ],
)
def test_texts_that_differ_only_in_markup_addresses_names_or_unicodes_forms_stay_together(one: str, other: str) -> None:
    assert hash_of_words(one, 0) == hash_of_words(other, 0) != hash_of_words(one + " word", 0)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("\u770bhttps://x.y/abc\u8fd9\u4e2a\u7535\u5f71\u5f88\u597d\u770b", "\u770bhttps://x.y/abc\u90a3\u4e2a\u5f88\u7cdf\u7cd5"),
        ("\u56de\u590d @ming\u8fd9\u4e2a\u7535\u5f71\u5f88\u597d\u770b", "\u56de\u590d @hong\u6211\u5f88\u8ba8\u538c\u5b83"),
        ("price<b and more>c is it", "price c is it"),
        ("if a < b or b > a", "if a  a"),
    ],
)
def test_what_only_looks_like_markup_or_is_written_on_behind_it_without_a_space_counts(one: str, other: str) -> None:
    assert hash_of_words(one, 0) != hash_of_words(other, 0)


def test_texts_without_a_word_are_divided_too() -> None:
    splits = {split_by_text("!" * count, seed=0, validation_fraction=0.3, test_fraction=0.3) for count in range(1, 60)}
    assert splits == {"train", "validation", "test"}


@pytest.fixture
def rows(tmp_path: Path) -> str:
    """A row a day for ten days, with a split column that says something else; the last has no time."""
    days = [(START + timedelta(days=day)).isoformat() for day in range(9)] + [None]
    table = pd.DataFrame({"user_id": "u", "text": "same text", "label": 1, "split": "train", "timestamp": days})
    table.to_json(tmp_path / "rows.jsonl", orient="records", lines=True)
    return str(tmp_path / "rows.jsonl")


def test_by_time_training_is_the_past_and_test_the_future_and_rows_without_a_time_are_bad(rows: str) -> None:
    settings = SourceSettings.model_validate({"source": rows, "split_times": {"validation": "2020-01-06", "test": "2020-01-08T00:00:00Z"}})
    rules, division = settings.row_rules("classification"), settings.split_rules()
    checked = [row for unit in list_units(settings) for raw in read_unit(unit, settings) for row in rules.check(raw)]
    good = [row[1] for row in checked if not isinstance(row, BadRow)]
    assert all(isinstance(row, Row) for row in good)
    assert [division.of(row) for row in good] == ["train"] * 5 + ["validation"] * 2 + ["test"] * 2
    assert [row.reason for row in checked if isinstance(row, BadRow)] == ["timestamp is missing, and split_times divides the rows by it"]


@pytest.mark.parametrize(
    ("times", "reason"),
    [
        ({"validation": "2020-02-01", "test": "2020-01-01"}, "validation must lie before test"),
        ({"test": "soon"}, "not a date"),
        ({"validation": "2020-01-01"}, "split_times.test"),
        ({"test": 2016}, "2016 would be 2016 seconds after 1970: write a date"),
        ({"test": 20160101}, "write a date, such as 2016-01-01"),
    ],
)
def test_times_that_divide_nothing_are_refused_in_words(times: dict[str, str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        parse_settings({"data": {"source": "synthetic://", "split_times": times}})
