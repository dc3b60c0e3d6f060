"""LaMP's labelled tasks, as the benchmark lays them out: profiles train, questions are judged, and what is missing is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import plora_ray.data.lamp as lamp
from plora_ray.data.rows import BadRow, Row, RowRules
from plora_ray.data.source_settings import SourceSettings
from plora_ray.data.sources import list_units, read_unit
from plora_ray.errors import DataError

PROMPTS = {
    "score": ("text", "What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, 3, 4, or 5. review: "),
    "tag": ("description", "Which tag does this movie relate to? tags: [sci-fi, comedy] description: "),
    "category": ("text", "Which category does this article relate to? categories: [travel, crime] article: "),
}


def write_part(folder: Path, part: str, users: list[dict[str, Any]], golds: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{part}_questions.json").write_text(json.dumps(users, indent=2), encoding="utf-8")
    outputs = {"task": "LaMP", "golds": [{"id": name, "output": output} for name, output in golds.items()]}
    (folder / f"{part}_outputs.json").write_text(json.dumps(outputs), encoding="utf-8")


def user(name: str, label: str, texts: list[str]) -> dict[str, Any]:
    """A question about the last text; those before are the profile, labelled 1, 2, ..."""
    text, prompt = PROMPTS[label]
    profile = [{"id": f"{name}{number}", text: words, label: str(number)} for number, words in enumerate(texts[:-1], start=1)]
    return {"id": name, "input": prompt + texts[-1], "profile": profile}


def read(source: str, **changes: Any) -> list[Row | BadRow]:
    settings = SourceSettings(source=source, **changes)
    rules = RowRules("classification", settings.max_text_chars)
    checked = [row for unit in list_units(settings) for raw in read_unit(unit, settings) for row in rules.check(raw)]
    return [row if isinstance(row, BadRow) else row[1] for row in checked]


@pytest.mark.parametrize("label", list(PROMPTS))
@pytest.mark.parametrize("nested", [False, True])
def test_profiles_are_training_rows_and_questions_are_judged(label: str, nested: bool, tmp_path: Path) -> None:
    for part in ("train", "dev"):
        folder = tmp_path / part if nested else tmp_path
        write_part(folder, part, [user("7", label, ["one", "two", f"asked: {part}"])], {"7": "5"})
    rows = read(f"lamp://{tmp_path}")
    assert [(row.user_id, row.text, row.label, row.split) for row in rows if isinstance(row, Row)] == [
        ("train-7", "one", "1", "train"), ("train-7", "two", "2", "train"), ("train-7", "asked: train", "5", "validation"),
        ("dev-7", "one", "1", "train"), ("dev-7", "two", "2", "train"), ("dev-7", "asked: dev", "5", "test"),
    ]  # fmt: skip
    assert [row.user_id for row in read(f"lamp://{tmp_path}", filter={"cohort": "b"}) if isinstance(row, Row)] == ["dev-7"] * 3


def test_a_missing_file_is_one_line_that_says_where_to_get_it(tmp_path: Path) -> None:
    write_part(tmp_path, "train", [user("7", "tag", ["one", "two"])], {"7": "5"})
    with pytest.raises(DataError, match=r"dev_questions.json or dev_outputs.json is missing: download .* https://") as caught:
        list_units(SourceSettings(source=f"lamp://{tmp_path}"))
    assert "\n" not in str(caught.value)


def test_a_task_without_labels_is_refused(tmp_path: Path) -> None:
    for part in ("train", "dev"):
        write_part(
            tmp_path, part, [{"id": "7", "input": "Generate a headline", "profile": [{"id": "1", "title": "t", "text": "x"}]}], {"7": "h"}
        )
    with pytest.raises(DataError, match="only LaMP-2 and LaMP-3 have labels"):
        list_units(SourceSettings(source=f"lamp://{tmp_path}"))


def test_what_a_question_lacks_is_named_by_its_number(tmp_path: Path) -> None:
    write_part(tmp_path, "dev", [user("9", "score", ["one", "two"])], {"9": "5"})
    good, unknown, other = (user(name, "score", ["one", "two"]) for name in ("1", "2", "3"))
    good["profile"].append("a text without a label")
    write_part(tmp_path, "train", [good, unknown, {**other, "input": "no such sentence"}, {"id": "4"}], {"1": "5", "3": "5", "4": "1"})
    bad = sorted((row.row, row.reason) for row in read(f"lamp://{tmp_path}") if isinstance(row, BadRow))
    assert bad[0][0] == 1 and "text" in bad[0][1]
    assert bad[1:] == [
        (2, "has no output in train_outputs.json"),
        (3, "has no 'review:' in its input"),
        (4, "has no id, no input, or no profile with tag, category or score"),
    ]


def test_an_author_without_a_profile_is_a_bad_row_wherever_he_stands(tmp_path: Path) -> None:
    for part in ("train", "dev"):
        write_part(
            tmp_path, part, [{**user("1", "tag", ["one", "two"]), "profile": []}, user("2", "tag", ["one", "two"])], {"1": "a", "2": "b"}
        )
    rows = read(f"lamp://{tmp_path}", on_bad_row="skip")
    assert [row.row for row in rows if isinstance(row, BadRow)] == [1, 1]
    assert [row.user_id for row in rows if isinstance(row, Row)] == ["train-2"] * 2 + ["dev-2"] * 2


@pytest.mark.parametrize("questions", ['[{"id": "7", "profile": [{"sco', '{"id": "7"}', ""])
def test_a_file_that_is_not_whole_is_one_line(questions: str, tmp_path: Path) -> None:
    for part in ("train", "dev"):
        write_part(tmp_path, part, [user("7", "score", ["one", "two"])], {"7": "5"})
    (tmp_path / "train_questions.json").write_text(questions)
    with pytest.raises(DataError, match=r"train_questions.json is (not whole|no JSON array)") as caught:
        list_units(SourceSettings(source=f"lamp://{tmp_path}"))
    assert "\n" not in str(caught.value)


@settings(max_examples=50, deadline=None)
@given(
    users=st.lists(st.lists(st.text(), min_size=1, max_size=4), max_size=6), buffer=st.integers(1, 40), indent=st.sampled_from([None, 1])
)
def test_questions_read_piece_by_piece_are_those_read_whole(
    users: list[list[str]], buffer: int, indent: int | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("lamp") / "questions.json"
    questions = [{"id": str(number), "profile": texts} for number, texts in enumerate(users)]
    path.write_bytes(json.dumps(questions, indent=indent, ensure_ascii=False).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lamp, "READ_BUFFER_BYTES", buffer)
        assert list(lamp._elements(path)) == questions
