"""Partitioning on a real local cluster, compared with pandas row by row."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from plora_ray.data import PartitionStats, SourceSettings, collate, label_space, partition_rows, read_partition
from plora_ray.data.partition import PartitionProgress, PartitionTable
from plora_ray.data.trained_users import read_trained_users
from plora_ray.errors import DataError
from plora_ray.identity import partition_of, user_key

SECRET = b"a secret of the store, 32 bytes."
PARTITIONS = 3
pytestmark = pytest.mark.usefixtures("cluster")


class Partitioner:
    """Calls `partition_rows` with the parameters that the tests have in common."""

    def __init__(self, tokenizer_path: str, folder: Path) -> None:
        self.tokenizer_path, self.folder = tokenizer_path, folder

    def __call__(
        self, source: object, name: str, task: str = "classification", partitions: int = PARTITIONS, **settings: object
    ) -> PartitionStats:
        found = SourceSettings.model_validate({"source": str(source), **settings})
        return partition_rows(found, task, str(self.folder / name), partitions, SECRET, self.tokenizer_path, 32)  # type: ignore[arg-type]


@pytest.fixture
def partition(tokenizer_path: str, tmp_path: Path) -> Partitioner:
    return Partitioner(tokenizer_path, tmp_path)


def contents(folder: Path, partitions: int = PARTITIONS) -> list[dict[str, object]]:
    return [row for p in range(partitions) for row in pq.read_table(folder / f"partition-{p:05d}.parquet").to_pylist()]


def test_every_row_is_in_the_one_partition_of_its_user_and_formats_agree(
    partition: Partitioner, tmp_path: Path, ratings: pd.DataFrame, tokenizer_path: str
) -> None:
    ratings.to_parquet(tmp_path / "a.parquet", row_group_size=150)
    ratings.to_csv(tmp_path / "a.csv", index=False)
    ratings.to_json(tmp_path / "a.jsonl", orient="records", lines=True, date_format="iso")
    stats = {kind: partition(tmp_path / f"a.{kind}", kind) for kind in ("parquet", "csv", "jsonl")}
    rows = {kind: contents(tmp_path / kind) for kind in stats}
    assert rows["parquet"] == rows["csv"] == rows["jsonl"]

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    keys = [user_key(user, SECRET) for user in ratings.user_id]
    expected = ratings.assign(key=keys, place=range(len(ratings)))
    expected["ids"] = [tuple(tokenizer(text, truncation=True, max_length=32)["input_ids"]) for text in ratings.text]
    expected = expected.sort_values(["key", "place"])
    codes = {"train": 0, "validation": 1, "test": 2}
    wanted = list(
        zip(
            expected.key,
            expected.ids,
            expected.label.astype(str),
            expected.split.map(codes),
            expected.timestamp.dt.tz_localize("UTC"),
            strict=True,
        )
    )
    assert [(row["key"], tuple(row["input_ids"]), row["label"], row["split"], row["timestamp"]) for row in rows["parquet"]] == wanted  # type: ignore[arg-type]
    for p in range(PARTITIONS):
        assert {partition_of(row["key"], PARTITIONS) for row in pq.read_table(tmp_path / f"csv/partition-{p:05d}.parquet").to_pylist()} == {
            p
        }

    found = stats["csv"]
    assert found.model_copy(update={"digest": ""}) == stats["parquet"].model_copy(update={"digest": ""})
    assert found.users == ratings.user_id.nunique() and found.train_users == ratings[ratings.split == "train"].user_id.nunique()
    assert found.rows() == 600 and found.rows("test") == (ratings.split == "test").sum() and found.tokens == expected.ids.map(len).sum()
    assert found.label_counts["train"] == dict(Counter(ratings[ratings.split == "train"].label.astype(str)))
    assert label_space(found, "classification") == ["0", "1", "2"]


def test_a_table_hands_out_users_rows_and_tokens_and_files_hold_no_id_and_no_text(
    partition: Partitioner, tmp_path: Path, ratings: pd.DataFrame
) -> None:
    ratings.to_parquet(tmp_path / "a.parquet")
    partition(tmp_path / "a.parquet", "out")
    for p in range(PARTITIONS):
        table, rows = read_partition(str(tmp_path / "out"), p), pq.read_table(tmp_path / f"out/partition-{p:05d}.parquet").to_pylist()
        assert table.rows == len(rows) and [key.tobytes() for key in table.keys] == sorted({row["key"] for row in rows})
        assert table.labels.tolist() == [row["label"] for row in rows]
        assert [table.keys[user].tobytes() for user in table.user_of_row] == [row["key"] for row in rows]
        users = {key.tobytes() for key in table.keys[1:3]}
        assert table.rows_of(slice(1, 3), "test").tolist() == [i for i, row in enumerate(rows) if row["split"] == 2 and row["key"] in users]
        assert table.rows_of(slice(0, 0), "train").size == 0
        ids, mask = collate(table, np.array([3, 0]), pad_id=0)
        assert [row[row_mask == 1].tolist() for row, row_mask in zip(ids, mask, strict=True)] == [
            rows[3]["input_ids"],
            rows[0]["input_ids"],
        ]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "_done.json",
        *(f"partition-{p:05d}.{kind}" for p in range(PARTITIONS) for kind in ("parquet", "users.safetensors")),
    ]
    raw = b"".join(path.read_bytes() for path in (tmp_path / "out").glob("*"))
    plain = json.dumps(contents(tmp_path / "out"), default=str)
    assert b"person-" not in raw and b"Film" not in raw and "person" not in plain and "Film" not in plain


def test_without_a_split_column_no_text_lies_in_two_splits(partition: Partitioner, tmp_path: Path, ratings: pd.DataFrame) -> None:
    ratings.drop(columns="split").to_parquet(tmp_path / "a.parquet")
    stats = partition(tmp_path / "a.parquet", "out", validation_fraction=0.2, test_fraction=0.2)
    splits = pd.DataFrame(contents(tmp_path / "out")).assign(ids=lambda frame: frame.input_ids.map(tuple)).groupby("ids").split.nunique()
    assert (splits == 1).all() and all(stats.rows(split) > 0 for split in ("train", "validation", "test"))


def test_bad_rows_stop_the_job_with_file_row_and_reason_or_are_counted(
    partition: Partitioner, tmp_path: Path, ratings: pd.DataFrame
) -> None:
    broken = ratings.assign(text=[" " if i % 20 == 3 else text for i, text in enumerate(ratings.text)])
    broken.to_csv(tmp_path / "a.csv", index=False)
    broken.assign(text=ratings.text, label=[None if i < 3 else 1 for i in range(600)]).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(DataError) as failure:
        partition(tmp_path / "a.csv", "out")
    first, *lines = str(failure.value).split("\n")
    assert "on_bad_row: skip" in first and len(lines) == 20
    assert lines[0] == f"{tmp_path}/a.csv:{3 * 2 + 2}: text is blank"  # each record before it takes two lines
    assert not any(path.name.startswith(("fragments", "_done")) for path in (tmp_path / "out").glob("*"))
    with pytest.raises(DataError, match="b.parquet:1: label is (missing|not finite)"):
        partition(tmp_path / "b.parquet", "out")
    stats = partition(tmp_path / "a.csv", "out", on_bad_row="skip")
    assert stats.skipped == {"text is blank": 30} and stats.rows() == 570


def test_a_half_written_partitioning_is_made_again_and_a_finished_one_is_recognised(
    partition: Partitioner, tmp_path: Path, ratings: pd.DataFrame
) -> None:
    ratings.to_parquet(tmp_path / "a.parquet")
    first = partition(tmp_path / "a.parquet", "out")
    whole = contents(tmp_path / "out")
    (tmp_path / "out/_done.json").write_text('{"digest": "half')
    (tmp_path / "out/partition-00001.parquet").write_bytes(b"PAR1 half")
    (tmp_path / "out/partition-00009.parquet").write_bytes(b"of another number of partitions")
    (tmp_path / "out/fragments-dead").mkdir()
    (tmp_path / "out/fragments-dead/unit-000000-00000.arrow").write_bytes(b"half")
    assert partition(tmp_path / "a.parquet", "out") == first and contents(tmp_path / "out") == whole
    assert len(list((tmp_path / "out").iterdir())) == 2 * PARTITIONS + 1
    changed_at = (tmp_path / "out/partition-00001.parquet").stat().st_mtime_ns
    assert partition(tmp_path / "a.parquet", "out") == first
    assert (tmp_path / "out/partition-00001.parquet").stat().st_mtime_ns == changed_at
    with pytest.raises(DataError, match="other rows or settings"):
        partition(tmp_path / "a.parquet", "out", partitions=PARTITIONS + 1)


def test_nothing_to_train_on_is_an_error(partition: Partitioner, tmp_path: Path, ratings: pd.DataFrame) -> None:
    ratings.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no usable row"):
        partition(tmp_path / "a.parquet", "out", filter={"cohort": "c"})
    ratings[ratings.split == "test"].to_parquet(tmp_path / "b.parquet")
    with pytest.raises(DataError, match="train split"):
        partition(tmp_path / "b.parquet", "out")


def test_files_that_disagree_about_having_splits_are_refused(partition: Partitioner, tmp_path: Path, ratings: pd.DataFrame) -> None:
    (tmp_path / "in").mkdir()
    ratings.to_parquet(tmp_path / "in/a.parquet")
    ratings.drop(columns="split").to_csv(tmp_path / "in/b.csv", index=False)
    with pytest.raises(DataError, match="a.parquet has a split column, .*b.csv has none"):
        partition(tmp_path / "in", "out")


def test_regression_keeps_numbers_and_synthetic_users_reach_their_partitions(
    partition: Partitioner, tmp_path: Path, ratings: pd.DataFrame, tokenizer_path: str
) -> None:
    numbers = ratings.assign(label=ratings.label + 1000.25)
    numbers.to_csv(tmp_path / "many.csv", index=False)
    trained = numbers.label[numbers.split == "train"]
    assert partition(tmp_path / "many.csv", "many", task="regression").label_moments() == pytest.approx(
        (trained.mean(), trained.std(ddof=0))
    )
    ratings.assign(label=ratings.label + 0.25).to_csv(tmp_path / "a.csv", index=False)
    partition(tmp_path / "a.csv", "numbers", task="regression", partitions=1)
    table = read_partition(str(tmp_path / "numbers"), 0)
    assert table.labels.dtype == np.float64 and sorted(set(table.labels.tolist())) == [0.25, 1.25, 2.25]
    seen: list[PartitionProgress] = []
    source = SourceSettings(source="synthetic://?users=60&texts=8&seed=1")
    destination = (tmp_path / "made").as_uri()
    stats = partition_rows(source, "classification", destination, 2, SECRET, tokenizer_path, 32, progress=seen.append)
    assert stats.users == stats.train_users == 60 and stats.rows() == 480 and label_space(stats, "classification") == ["dislike", "like"]
    assert [(step.stage, step.done, step.total, step.rows) for step in seen][0] == ("read", 1, 1, 480) and seen[-1] == (
        "tokenise",
        2,
        2,
        480,
    )


def test_the_rows_of_some_users_are_those_of_the_partition_and_no_others(
    partition: Partitioner, tmp_path: Path, ratings: pd.DataFrame
) -> None:
    ratings.to_csv(tmp_path / "a.csv", index=False)
    partition(tmp_path / "a.csv", "out", partitions=1)
    whole = read_partition(str(tmp_path / "out"), 0)
    chosen = np.arange(whole.users) % 3 == 1
    part = whole.of_users(chosen)

    def rows(table: PartitionTable) -> list[tuple[bytes, list[int], str, int]]:
        spans = zip(table.row_offsets, table.row_offsets[1:], strict=False)
        tokens = [table.tokens[start:stop].tolist() for start, stop in spans]
        keys = [table.keys[user].tobytes() for user in table.user_of_row]
        return list(zip(keys, tokens, table.labels.tolist(), table.split.tolist(), strict=True))

    kept = {key.tobytes() for key in whole.keys[chosen]}
    assert rows(part) == [row for row in rows(whole) if row[0] in kept] and part.users == len(kept)
    assert read_trained_users(str(tmp_path / "out"), 0).rows.sum() == (ratings.split == "train").sum()


def test_the_label_space_is_what_training_has_seen() -> None:
    def stats(**counts: dict[str, int]) -> PartitionStats:
        return PartitionStats(digest="", partitions=[], label_counts={"train": {}, "validation": {}, "test": {}, **counts}, skipped={})  # type: ignore[dict-item]

    assert label_space(stats(train={"10": 1, "9": 1, "-1": 3}), "classification") == ["-1", "9", "10"]
    assert label_space(stats(train={"10": 1, "9": 1, "x": 3}), "classification") == ["10", "9", "x"]
    assert label_space(stats(), "regression") == []
    with pytest.raises(DataError, match="only the test split has can't be learned: 'c'"):
        label_space(stats(train={"a": 1, "b": 1}, test={"c": 2, "a": 1}), "classification")
    with pytest.raises(DataError, match=r"'-0\.5', '1\.25'; set task: regression if they are amounts"):
        label_space(stats(train={"0.1": 1, "0.2": 1}, validation={"1.25": 1, "-0.5": 1}), "classification")
    with pytest.raises(DataError, match="at least two labels, found only 'a'"):
        label_space(stats(train={"a": 9}), "classification")
