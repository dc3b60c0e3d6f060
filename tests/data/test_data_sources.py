"""Reading: formats, mapping, filter, and errors that say what to change. No cluster."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pandas as pd
import pytest

from plora_ray.data.locations import holds_credentials, shown_location
from plora_ray.data.rows import BadRow, RowRules
from plora_ray.data.source_settings import ColumnMapping, SourceSettings
from plora_ray.data.sources import fingerprint, list_units, read_unit, suggest_partitions
from plora_ray.data.units import ReadUnit
from plora_ray.errors import DataError

GOOD_LINE = '{"user_id": "u", "text": "fine", "label": 1}'


def read(settings: SourceSettings) -> list[tuple[int, object]]:
    """(row number, (user_id, text, label) or reason) of every row of a source."""
    rules, found = RowRules("classification", settings.max_text_chars), []
    for unit in list_units(settings):
        for raw in read_unit(unit, settings):
            for row in rules.check(raw):
                found.append((row.row, row.reason) if isinstance(row, BadRow) else (row[0], (row[1].user_id, row[1].text, row[1].label)))
    return found


def settings_for(path: Path | str, **more: object) -> SourceSettings:
    return SourceSettings.model_validate({"source": str(path), **more})


def test_every_format_reads_the_same_rows(tmp_path: Path, ratings: pd.DataFrame) -> None:
    ratings.to_parquet(tmp_path / "a.parquet", row_group_size=100)
    ratings.to_csv(tmp_path / "a.csv.gz", index=False)
    ratings.to_json(tmp_path / "a.jsonl", orient="records", lines=True, date_format="iso")
    rows = {name: [row for _, row in read(settings_for(tmp_path / name))] for name in ("a.parquet", "a.csv.gz", "a.jsonl")}
    expected = [(user, text, str(label)) for user, text, label in zip(ratings.user_id, ratings.text, ratings.label, strict=True)]
    assert rows == dict.fromkeys(rows, expected)
    assert len(list_units(settings_for(tmp_path / "a.parquet"))) == 6


def test_parquet_rows_are_numbered_across_row_groups(tmp_path: Path, ratings: pd.DataFrame) -> None:
    ratings.assign(text=[" " if i == 249 else "fine" for i in range(600)]).to_parquet(tmp_path / "a.parquet", row_group_size=100)
    assert [number for number, row in read(settings_for(tmp_path / "a.parquet")) if row == "text is blank"] == [250]


def test_a_bad_csv_line_is_named_by_its_line_and_ids_keep_their_zeros(tmp_path: Path) -> None:
    content = b'user_id,text,label\n007,"two\nlines",1\nu,too,many,fields\nu,\xff,1\nu,fine,\n\n8,fine,2.0\n'
    (tmp_path / "a.csv").write_bytes(content)
    assert sorted(read(settings_for(tmp_path / "a.csv")), key=lambda row: row[0]) == [
        (2, ("007", "two\nlines", "1")),
        (4, "has 4 fields where the header has 3"),
        (5, "text is not valid Unicode"),
        (6, "label is blank"),
        (8, ("8", "fine", "2")),
    ]


def test_a_bad_json_line_is_named_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"user_id": 1, "text": "fine", "label": true}\n\n[1]\n{"user_id": \n{"user_id": 2, "text": "x"}\n')
    found = dict(read(settings_for(tmp_path / "a.json")))
    assert found[1] == ("1", "fine", "1") and found[5] == "label is missing"
    assert "JSON object" in str(found[3]) and "not valid JSON" in str(found[4])


def test_columns_can_be_mapped_and_rows_filtered_by_equality_of_value(tmp_path: Path) -> None:
    frame = pd.DataFrame({"who": [1, 2, 3], "review": ["a", "b", "c"], "stars": [5, 4, 3], "cohort": [1, 2, 1], "kind": ["x", "x", "y"]})
    columns = {"user_id": "who", "text": "review", "label": "stars"}
    frame.to_parquet(tmp_path / "a.parquet")
    frame.to_csv(tmp_path / "a.csv", index=False)
    for name in ("a.parquet", "a.csv"):
        assert read(settings_for(tmp_path / name, columns=columns, filter={"cohort": 1, "kind": "x"})) == [
            (1 if name == "a.parquet" else 2, ("1", "a", "5"))
        ]
    with pytest.raises(DataError, match=r"no column 'sort' \(data.filter\); it has: who, review, stars, cohort, kind"):
        read(settings_for(tmp_path / "a.csv", columns=columns, filter={"sort": "x"}))


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.jsonl"])
def test_a_missing_column_is_named_with_those_that_exist(tmp_path: Path, name: str) -> None:
    frame = pd.DataFrame({"user_id": ["u"], "text": ["t"], "stars": [1]})
    writers = {
        "a.parquet": frame.to_parquet,
        "a.csv": lambda p: frame.to_csv(p, index=False),
        "a.jsonl": lambda p: frame.to_json(p, orient="records", lines=True),
    }
    writers[name](tmp_path / name)
    with pytest.raises(DataError, match=r"no column 'label' \(columns.label\); it has: user_id, text, stars"):
        read(settings_for(tmp_path / name))
    mapped = {"label": "stars"}
    assert len(read(settings_for(tmp_path / name, columns=mapped))) == 1  # split and timestamp are absent under default names
    with pytest.raises(DataError, match=r"no column 'fold' \(columns.split\)"):
        read(settings_for(tmp_path / name, columns={**mapped, "split": "fold"}))


def test_a_mapping_means_the_same_after_a_round_trip_through_its_dump() -> None:
    mapping = ColumnMapping.model_validate(ColumnMapping().model_dump())
    assert mapping.resolve(("user_id", "text", "label"), "f") == ColumnMapping(timestamp=None, split=None)


def test_a_json_column_that_begins_midway_is_refused(tmp_path: Path) -> None:
    late = json.dumps({"user_id": "u", "text": "fine", "label": 1, "split": "test"})
    (tmp_path / "a.jsonl").write_text("\n".join([GOOD_LINE] * 5000 + [late]))
    with pytest.raises(DataError, match="columns.split: null"):
        read(settings_for(tmp_path / "a.jsonl"))
    assert len(read(settings_for(tmp_path / "a.jsonl", columns={"split": None}))) == 5001


def test_a_directory_a_glob_and_a_file_url_find_the_data_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "_logs").mkdir()
    for name in ("b.jsonl", "a.jsonl", "sub/c.ndjson", "_logs/d.jsonl", ".e.jsonl", "README.md"):
        (tmp_path / name).write_text(GOOD_LINE)
    with gzip.open(tmp_path / "f.jsonl.gz", "wt") as stream:
        stream.write(GOOD_LINE)
    names = [Path(unit.file).name for unit in list_units(settings_for(tmp_path))]
    assert names == ["a.jsonl", "b.jsonl", "f.jsonl.gz", "c.ndjson"]
    assert len(read(settings_for(tmp_path))) == 4
    assert len(list_units(settings_for(f"{tmp_path}/*.jsonl"))) >= 2
    assert len(read(settings_for(f"file://{tmp_path}/a.jsonl"))) == 1


def test_what_is_not_there_or_not_readable_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "broken.parquet").write_text("x")
    (tmp_path / "broken.csv.gz").write_text("x")
    (tmp_path / "empty").mkdir()
    for source, reason in [
        ("nowhere.csv", "doesn't exist"),
        ("*.csv", "matches no file"),
        ("notes.txt", "unknown extension"),
        ("empty", "holds no data file"),
        ("broken.parquet", "not a readable parquet file"),
        ("broken.csv.gz", "can't be read"),
    ]:
        with pytest.raises(DataError, match=reason) as failure:
            read(settings_for(tmp_path / source))
        assert "\n" not in str(failure.value)
    with pytest.raises(DataError, match="can't be listed"):
        list_units(settings_for("nosuch://bucket/a.csv"))


def test_the_fingerprint_follows_the_files_and_the_settings_and_not_the_credentials(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD_LINE)

    def of(**more: object) -> str:
        settings = settings_for(path, **more)
        return fingerprint(settings, list_units(settings))

    first = of()
    assert first == of() == of(storage_options={"auto_mkdir": True})
    assert len({first, of(filter={"label": 1}), of(test_fraction=0.3), of(columns={"split": None})}) == 4
    path.write_text(GOOD_LINE + "\n" + GOOD_LINE)
    assert of() != first


def test_hugging_face_datasets_are_read_by_name_split_and_from_save_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    import datasets

    rows = datasets.Dataset.from_dict({"user_id": ["a", "b"], "text": ["one", "two"], "label": [0, 1]})
    (tmp_path / "folder").mkdir()
    for split in ("train", "test"):
        rows.to_parquet(tmp_path / "folder" / f"{split}.parquet")
    datasets.DatasetDict(train=rows, dev=rows).save_to_disk(tmp_path / "saved")
    expected = [(1, ("a", "one", "0")), (2, ("b", "two", "1"))]
    for source, splits in [("folder", {"train", "test"}), ("saved", {"train", "dev"}), ("folder/test", {None}), ("saved:/dev", {None})]:
        settings = settings_for(f"hf://{tmp_path}/{source}")
        raws = [raw for unit in list_units(settings) for raw in read_unit(unit, settings)]
        assert {split for raw in raws for split in (raw.splits or [None])} == splits
        assert read(settings) == expected * len(splits)
        assert fingerprint(settings, list_units(settings)) == fingerprint(settings, list_units(settings))
    with pytest.raises(DataError, match="no split 'nosuch'; it has: train, test"):
        list_units(settings_for(f"hf://{tmp_path}/folder:/nosuch"))
    with pytest.raises(DataError, match="can't be opened"):
        list_units(settings_for(f"hf://{tmp_path}/no/thing"))


def test_unknown_settings_and_fractions_that_leave_no_training_rows_are_refused() -> None:
    for wrong in ({"sauce": "x"}, {"validation_fraction": 0.5, "test_fraction": 0.5}, {"on_bad_row": "ignore"}):
        with pytest.raises(ValueError, match="sauce|left to train on|on_bad_row"):
            SourceSettings.model_validate(wrong)


def test_partitions_grow_with_the_rows_and_no_partition_gets_more_than_a_task_holds(tmp_path: Path, ratings: pd.DataFrame) -> None:
    ratings.to_parquet(tmp_path / "a.parquet", row_group_size=100)
    assert sum(unit.rows for unit in list_units(settings_for(tmp_path / "a.parquet"))) == 600
    assert suggest_partitions(list_units(settings_for(tmp_path / "a.parquet"))) == 8
    assert suggest_partitions(list_units(settings_for("synthetic://?users=100000&texts=10"))) == 31  # 1,000,000 / 32,768
    long_texts = [ReadUnit(kind="parquet", file="a", rows=1000, size_bytes=10 * 2**30)]
    assert suggest_partitions(long_texts) == 160  # 64 MiB each
    plain = ReadUnit(kind="csv", file="a.csv", size_bytes=2**30)
    assert suggest_partitions([plain]) == 256
    assert suggest_partitions([plain.model_copy(update={"file": "a.csv.gz", "size_bytes": 2**28})]) > 256
    assert suggest_partitions([ReadUnit(kind="hf", file="hf://x#0")] * 100) == 200


@pytest.mark.parametrize(
    ("location", "shown"),
    [
        ("https://host/x.csv?X-Amz-Signature=secret", "https://host/x.csv"),
        ("filecache::HTTP://host/x.csv?sig=secret#here", "filecache::HTTP://host/x.csv"),
        ("403, message='Forbidden', url='https://host/x.csv?sig=secret'", "403, message='Forbidden', url='https://host/x.csv"),
        ("s3://bucket/part-?.parquet", "s3://bucket/part-?.parquet"),
        ("data/part-?.csv", "data/part-?.csv"),
        ("synthetic://?users=10", "synthetic://?users=10"),
    ],
)
def test_only_the_query_of_a_web_address_is_hidden(location: str, shown: str) -> None:
    assert shown_location(location) == shown


def test_an_at_sign_is_a_credential_only_before_a_host() -> None:
    assert all(map(holds_credentials, ("https://me:secret@host/x.csv", "sftp://me@host/x.csv", "zip://x.csv::https://token@host/x.zip")))
    harmless = ("https://host/me@home.csv", "data/me@home.csv", "abfs://box@account/x.csv", "hf://org/name@main", "s3://bucket/a@b")
    assert not any(map(holds_credentials, harmless))


def test_a_signed_address_that_cannot_be_read_is_an_error_without_its_signature() -> None:
    for source in ("http://127.0.0.1:9/x.csv?signature=hunter2", "http://127.0.0.1:9/x?signature=hunter2&name=x.csv"):
        with pytest.raises(DataError) as error:
            list(read_unit(ReadUnit(kind="csv", file=source, first=1), settings_for(source)))
        assert "http://127.0.0.1:9/x" in str(error.value) and "hunter2" not in str(error.value)
        with pytest.raises(DataError) as error:
            list_units(settings_for(source))
        assert "hunter2" not in str(error.value)
