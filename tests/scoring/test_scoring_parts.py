"""A table answered without HTTP: every row as the engine answers it, bad rows named, memory and files in pieces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from plora_ray.config import parse_settings
from plora_ray.data.sources import list_units
from plora_ray.errors import DataError
from plora_ray.inference import InferenceEngine, load_generation
from plora_ray.scoring import parts
from plora_ray.scoring.job import scoring_source
from plora_ray.scoring.parts import score_unit
from plora_ray.store import AdapterStore, ObjectStore
from tests.generations import LABELS, publish

USERS = [f"person {index}" for index in range(6)]


def table(path: Path, rows: int = 40, group: int = 25) -> list[tuple[str, str]]:
    """Rows of known and unknown users in a parquet file of two row groups."""
    values = [((*USERS, "nobody")[place % 7], f"text number {place} " + "word " * (place % 9)) for place in range(rows)]
    columns = {"who": [user for user, _ in values], "said": [text for _, text in values]}
    pq.write_table(pa.table(columns), path, row_group_size=group)
    return values


def tree(tiny_plm: str, tmp_path: Path, **data: Any) -> dict[str, Any]:
    return {
        "model": {"name": tiny_plm, "max_length": 32},
        "store": {"uri": str(tmp_path / "store")},
        "data": {"columns": {"user_id": "who", "text": "said"}, **data},
        "serving": {"replica_cpus": 0.5},
    }


def test_a_tables_rows_are_answered_as_the_engine_answers_them_in_files_of_bounded_size(
    tiny_plm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "ROWS_PER_PART", 10)
    monkeypatch.setattr(parts, "ROWS_AT_ONCE", 7)
    store = AdapterStore(str(tmp_path / "store"))
    publish(store, tiny_plm, "g1", USERS)
    rows = table(tmp_path / "rows.parquet")
    source = scoring_source(parse_settings(tree(tiny_plm, tmp_path)), str(tmp_path / "rows.parquet"))
    engine = InferenceEngine(load_generation(store))
    units = list_units(source)
    scored = [score_unit(number, unit, source, engine, ObjectStore(str(tmp_path / "out"))) for number, unit in enumerate(units)]
    answers = [engine.predict([row])[0] for row in rows]
    engine.close()
    assert [(unit.rows, unit.parts) for unit in scored] == [(25, 3), (15, 2)]
    assert sum(unit.personal for unit in scored) == sum(user != "nobody" for user, _ in rows)
    found = pq.read_table(tmp_path / "out").to_pylist()
    assert [(row["user_id"], row["row"]) for row in found] == [(user, place) for place, (user, _) in enumerate(rows, start=1)]
    for row, answer in zip(found, answers, strict=True):
        assert (row["label"], row["personalization"], row["generation"]) == (answer.prediction.label, answer.personalization, "g1")
        assert row["scores"] == pytest.approx(answer.prediction.scores, abs=1e-5) and list(row["scores"]) == list(LABELS.classes)
        assert row["reason"] is None and row["file"].endswith("rows.parquet")


def test_a_bad_row_stops_the_unit_with_its_place_or_is_skipped_and_counted(tiny_plm: str, tmp_path: Path) -> None:
    store = AdapterStore(str(tmp_path / "store"))
    publish(store, tiny_plm, "g1", USERS)
    pq.write_table(pa.table({"who": ["ann", None, "bob"], "said": ["x", "y", " "]}), tmp_path / "rows.parquet")
    engine, out = InferenceEngine(load_generation(store)), ObjectStore(str(tmp_path / "out"))
    stop, skip = (
        scoring_source(parse_settings(tree(tiny_plm, tmp_path, on_bad_row=how)), str(tmp_path / "rows.parquet")) for how in ("stop", "skip")
    )
    with pytest.raises(DataError, match=r"rows.parquet:2: user_id is missing; .*rows.parquet:3: text is blank"):
        score_unit(0, list_units(stop)[0], stop, engine, out)
    scored = score_unit(0, list_units(skip)[0], skip, engine, out)
    engine.close()
    assert (scored.rows, scored.personal, scored.skipped, scored.parts) == (1, 0, 2, 1)
    with pytest.raises(DataError, match="has no column 'who'"):
        pq.write_table(pa.table({"user": ["ann"], "said": ["x"]}), tmp_path / "other.parquet")
        list_units(scoring_source(parse_settings(tree(tiny_plm, tmp_path)), str(tmp_path / "other.parquet")))
