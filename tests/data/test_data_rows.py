"""What a row must be, and the canonical forms of what it holds."""

from __future__ import annotations

from datetime import UTC, date, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plora_ray.data.rows import (
    RawRows,
    RowProblem,
    RowRules,
    canonical_split,
    canonical_timestamp,
    canonical_user_id,
    class_label,
    number_label,
)

RULES = RowRules("classification", max_text_chars=50)


@pytest.mark.parametrize(
    ("given_label", "name"),
    [(3, "3"), (3.0, "3"), ("3", "3"), ("3.0", "3"), ("-2.00", "-2"), (True, "1"), (2.5, "2.5"), (" like ", "like"), ("v1.0", "v1.0")],
)
def test_a_class_has_one_name_whatever_type_its_column_has(given_label: object, name: str) -> None:
    assert class_label(given_label) == name


@pytest.mark.parametrize("value", [None, "", "  ", float("nan"), float("inf"), [1], "\ud800", "1" * 5000, "1" * 5000 + ".0"])
def test_a_label_without_a_name_is_refused(value: object) -> None:
    with pytest.raises(RowProblem, match="label"):
        class_label(value)


@pytest.mark.parametrize("value", [None, "like", float("nan"), "inf", 10**400, [1]])
def test_a_regression_label_must_be_a_finite_number(value: object) -> None:
    with pytest.raises(RowProblem, match="label"):
        number_label(value)
    assert number_label("2.5") == 2.5 and number_label(True) == 1.0


def test_an_integer_user_id_becomes_text_and_a_float_or_missing_one_is_refused() -> None:
    assert canonical_user_id(1018) == "1018"
    for value in (1018.0, None, True, "", "a\nb"):
        with pytest.raises(RowProblem, match="user_id"):
            canonical_user_id(value)


def test_val_and_dev_mean_validation() -> None:
    assert [canonical_split(name) for name in ("val", "dev", "Valid", "TEST", "train")] == ["validation"] * 3 + ["test", "train"]
    with pytest.raises(RowProblem, match="train, validation or test"):
        canonical_split("holdout")


def test_a_moment_is_read_from_dates_iso_text_and_unix_seconds() -> None:
    noon = datetime(2024, 5, 1, 12, tzinfo=UTC)
    for value in (noon, datetime(2024, 5, 1, 12), "2024-05-01T12:00:00Z", "2024-05-01 14:00:00+02:00", noon.timestamp(), "1714564800"):
        assert canonical_timestamp(value) == noon
    assert canonical_timestamp(date(2024, 5, 1)) == canonical_timestamp("2024-05-01") == canonical_timestamp("20240501")
    assert canonical_timestamp(" ") is None
    for value in ("yesterday", 1.7e12, float("nan"), True):
        with pytest.raises(RowProblem, match="timestamp"):
            canonical_timestamp(value)


def test_a_bad_row_is_reported_with_file_row_and_reason_and_without_its_content() -> None:
    raw = RawRows("a.csv", [2, 3, 4, 5], ["u", "u", "u", "secret\n"], ["good", " ", "x" * 51, "good"], [0, 0, 0, 0])
    good, *bad = RULES.check(raw)
    assert isinstance(good, tuple) and good[0] == 2
    assert [str(row) for row in bad] == [
        "a.csv:3: text is blank",
        "a.csv:4: text is longer than 50 characters (max_text_chars)",
        "a.csv:5: user_id contains control characters",
    ]


json_values = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers(), max_size=2) | st.binary()


@given(json_values, json_values, json_values, json_values, json_values)
def test_any_values_give_a_canonical_row_or_a_reason(
    user_id: object, text: object, label: object, split: object, timestamp: object
) -> None:
    for rules in (RULES, RowRules("regression", 50)):
        try:
            row = rules.row(user_id, text, label, split, timestamp)
        except RowProblem as problem:
            assert str(problem)
        else:
            row.text.encode("utf-8"), row.user_id.encode("utf-8")
            assert isinstance(row.label, str if rules.task == "classification" else float)
