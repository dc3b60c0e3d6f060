"""Real rows by real users, end to end: submitted to a two-node cluster, stored in S3, newcomers onboarded over HTTP.

    python -m benchmarks.real_input DATA.parquet --out var/real_input

DATA has columns user_id, text, label, split and cohort: users of cohort a train, users of cohort b arrive afterwards
with 0, 4 or 16 examples. Prints one JSON object a line and figure.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow.parquet as pq
import typer
import yaml
from rich.progress import track

from cluster.local import LocalCluster
from cluster.node_process import free_port
from cluster.s3_server import S3Server
from plora_ray.client import Client
from plora_ray.evaluation.baselines import LabelHistory
from plora_ray.evaluation.metrics import (
    as_json,
    bootstrap_by_user,
    classification_scores,
    paired,
    row_nll,
)
from plora_ray.store import AdapterStore

Row = dict[str, Any]
EXAMPLES = (0, 4, 16)
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "benchmark", "AWS_SECRET_ACCESS_KEY": "benchmark"}


def main(
    data: Path,
    out: Annotated[Path, typer.Option(help="Working directory; an interrupted run in it goes on.")] = Path("var/real_input"),
    epochs: Annotated[int, typer.Option(help="Passes of the population stage.")] = 2,
    max_length: Annotated[int, typer.Option(help="Tokens a text is cut to.")] = 64,
) -> None:
    """Train on cohort a, onboard cohort b, print the figures."""
    out.mkdir(parents=True, exist_ok=True)
    os.environ.update(CREDENTIALS)
    with S3Server(out / "s3") as server:
        store_uri = server.create_bucket("plora") + "/adapters"
        config = out / "settings.yaml"
        config.write_text(yaml.safe_dump(_settings(data.resolve(), store_uri, server.endpoint_url, epochs, max_length)))
        published = _train(config.resolve(), out)
        report = _report(store_uri, server.endpoint_url, published["generation"])
        told = {"users": published["users"], "train_rows": published["examples"], "seconds": report["seconds"]}
        _print("cohort_a", {**report["test"], **told})
        with _serving(config, out) as client:
            _onboard(client, pq.read_table(data).to_pylist())


def _settings(data: Path, store_uri: str, endpoint_url: str, epochs: int, max_length: int) -> dict[str, Any]:
    return {
        "model": {"max_length": max_length},
        "data": {"source": str(data), "filter": {"cohort": "a"}},
        "training": {"epochs": epochs, "user_learning_rate": 0.005, "num_workers": 2, "users_per_wave": 200},
        "store": {"uri": store_uri, "endpoint_url": endpoint_url},
    }


def _train(config: Path, out: Path) -> dict[str, Any]:
    """The job, submitted as a user would; its last line."""
    with LocalCluster(nodes=2, cpus_per_node=1, env=CREDENTIALS) as cluster:
        command = [
            str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", str(cluster.dashboard_url), "--working-dir", ".",
            "--", "python", "-m", "plora_ray.train_all", "--config", str(config),
        ]  # fmt: skip
        print("$", " ".join(command), file=sys.stderr)
        log = out / "job.log"
        with log.open("w") as output:
            subprocess.run(command, env={**os.environ, **cluster.environment()}, stdout=output, stderr=subprocess.STDOUT, check=False)
    lines = [line for line in log.read_text().splitlines() if line.startswith('{"generation"')]
    if not lines:
        raise SystemExit(f"the job failed:\n{log.read_text()[-3000:]}")
    published: dict[str, Any] = json.loads(lines[-1])
    return published


def _report(store_uri: str, endpoint_url: str, generation: str) -> dict[str, Any]:
    store = AdapterStore.open(store_uri, {"endpoint_url": endpoint_url})
    report: dict[str, Any] = json.loads(store.objects.read(f"generations/{generation}/report.json"))
    return report


@contextmanager
def _serving(config: Path, out: Path) -> Iterator[Client]:
    port = free_port()
    with (out / "serve.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "plora_ray.cli", "serve", "--config", str(config), "--port", str(port)],
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        with Client(f"http://127.0.0.1:{port}") as client:
            for _ in range(600):
                if client.ready():
                    break
                time.sleep(0.5)
            yield client
    finally:
        process.terminate()
        process.wait(60)


def _onboard(client: Client, rows: list[Row]) -> None:
    """Every user of cohort b with 0, 4 and 16 examples, over HTTP; only users who have that many and test rows."""
    users: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        if row["cohort"] == "b":
            users.setdefault(row["user_id"], {"train": [], "validation": [], "test": []})[row["split"]].append(row)
    chosen = {name: parts for name, parts in users.items() if parts["test"] and len(parts["train"]) >= max(EXAMPLES)}
    trained = [str(row["label"]) for row in rows if row["cohort"] == "a" and row["split"] == "train"]
    classes = sorted(set(trained))
    frequencies = np.array([trained.count(name) for name in classes], float) / len(trained)
    truth = np.array([classes.index(str(row["label"])) for parts in chosen.values() for row in parts["test"]])
    owners = np.repeat(np.arange(len(chosen)), [len(parts["test"]) for parts in chosen.values()])
    population: np.ndarray | None = None
    for count in EXAMPLES:
        counts, seconds = np.zeros((len(chosen), len(classes))), []
        answers: list[dict[str, Any]] = []
        for place, (name, parts) in enumerate(track(chosen.items(), description=f"{count} examples")):
            examples = [(row["text"], row["label"]) for row in parts["train"][:count]]
            if examples:
                seconds.append(client.adapt(name, examples)["seconds"])
                np.add.at(counts[place], [classes.index(str(label)) for _, label in examples], 1)
            answers += client.predict([(name, row["text"]) for row in parts["test"]])
        scores = np.log(np.array([[answer["scores"][label] for label in classes] for answer in answers]))
        population = scores if population is None else population
        prior = LabelHistory.of_totals("classification", counts, frequencies, int(counts.sum())).label_prior(owners)
        _print(
            f"cohort_b_{count}_examples",
            {
                "users": len(chosen),
                "with_user": as_json(classification_scores(scores, truth)),
                "accuracy_interval": bootstrap_by_user((scores.argmax(1) == truth).astype(float), owners),
                "nll_interval": bootstrap_by_user(row_nll(scores, truth), owners),
                "nll_gain_over_population": paired(row_nll(scores, truth), row_nll(population, truth), owners),
                "user_label_prior": as_json(classification_scores(prior, truth)),
                "median_seconds_to_adapt": round(float(np.median(seconds)), 3) if seconds else None,
            },
        )


def _print(figure: str, values: dict[str, Any]) -> None:
    print(json.dumps({"figure": figure, **values}), flush=True)


if __name__ == "__main__":
    typer.run(main)
