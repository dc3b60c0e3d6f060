"""The paper's benchmarks, in the layout that the released code reads: same rows, both cohorts, and a missing file is one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from plora_ray.data.rows import BadRow, Row, RowRules
from plora_ray.data.source_settings import SourceSettings
from plora_ray.data.sources import list_units, read_unit
from plora_ray.errors import DataError

WIDE = "{user}\t\t{item}\t\t{label}\t\t{text}\n"  # IMDB, YELP: two tabs, no header
NARROW = "{user}\t{item}\t{label}\t{text}\n"  # GDRD, PPR: one tab, a header
LAYOUTS = {
    "imdb": ("imdb2/{c}/{part}-{c}.tsv", WIDE, ""),
    "yelp": ("yelp2/{c}/{part}-{c}.tsv", WIDE, ""),
    "gdrd": ("gdrd/{c}/goodreads_{part}_{C}.tsv", NARROW, "user_id\tbook_id\trating\treview_text\n"),
    "ppr": ("ppr/{c}/ppr_{part}_{C}.tsv", NARROW, "user_id\trecipe_id\trating\treview\n"),
}


def write_corpus(folder: Path, name: str) -> None:
    """Two rows a file, the second with a sentence mark and a quoted tab where the format allows one."""
    layout, line, header = LAYOUTS[name]
    for cohort in "ab":
        for part in ("train", "dev", "test"):
            path = folder / layout.format(c=cohort, C=cohort.upper(), part=part)
            path.parent.mkdir(parents=True, exist_ok=True)
            text = '"a\tb ""c"""' if header else "one . <sssss> two"
            first = line.format(user=f"{cohort}1", item="p", label=3, text=f"{part} text")
            path.write_text(header + first + line.format(user="007", item="q", label=1, text=text), encoding="utf-8")


def read(settings: SourceSettings) -> list[Row | BadRow]:
    rules = RowRules("classification", settings.max_text_chars)
    checked = [row for unit in list_units(settings) for raw in read_unit(unit, settings) for row in rules.check(raw)]
    return [row if isinstance(row, BadRow) else row[1] for row in checked]


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_every_set_is_read_as_it_lies_with_splits_and_cohorts(name: str, tmp_path: Path) -> None:
    write_corpus(tmp_path, name)
    rows = read(SourceSettings(source=f"paper://{name}{tmp_path}"))
    assert len(rows) == 12 and not [row for row in rows if isinstance(row, BadRow)]
    found = [(row.user_id, row.label, row.split) for row in rows if isinstance(row, Row)]
    assert [user for user, *_ in found] == ["a1", "007"] * 3 + ["b1", "007"] * 3
    assert [split for *_, split in found] == (["train"] * 2 + ["validation"] * 2 + ["test"] * 2) * 2
    assert {label for _, label, _ in found} == {"3", "1"}
    second = rows[1]
    assert isinstance(second, Row) and second.text.split() == (["a", "b", '"c"'] if LAYOUTS[name][2] else ["one", ".", "two"])
    cold = read(SourceSettings(source=f"paper://{name}{tmp_path}", filter={"cohort": "b"}))
    assert [row.user_id for row in cold if isinstance(row, Row)] == ["b1", "007"] * 3


def test_a_missing_file_is_one_line_that_says_where_to_get_it(tmp_path: Path) -> None:
    write_corpus(tmp_path, "imdb")
    (tmp_path / "imdb2" / "b" / "dev-b.tsv").unlink()
    with pytest.raises(DataError, match=r"imdb2/b/dev-b.tsv is missing: download the set as https://") as caught:
        list_units(SourceSettings(source=f"paper://imdb{tmp_path}"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("url", ["paper://", "paper://imdb", "paper://imdb/", "paper://mnist/corpus"])
def test_a_url_that_names_no_set_lists_those_there_are(url: str) -> None:
    with pytest.raises(DataError, match="imdb, yelp, gdrd, ppr"):
        list_units(SourceSettings(source=url))


def test_a_line_with_other_fields_is_named_by_its_number(tmp_path: Path) -> None:
    write_corpus(tmp_path, "yelp")
    (tmp_path / "yelp2" / "a" / "train-a.tsv").write_text("u\t\tp\t\t5\t\tfine\nu\tonly one tab\n\n")
    bad = [row for row in read(SourceSettings(source=f"paper://yelp{tmp_path}")) if isinstance(row, BadRow)]
    assert [(row.row, row.reason) for row in bad] == [(2, "has 1 fields where user, product, label and text are expected")]
