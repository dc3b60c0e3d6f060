"""What personalises best? One change at a time to where and how a user enters the model, judged on validation rows only.

    python -m benchmarks.ablation ../shared/data/crehate_en.parquet --seeds 0,1,2 --out var/ablation

DATA has columns user_id, text, label, split, cohort. The population stage trains on cohort a; its users are then fitted from their training
rows and those validation rows that don't judge, and users of cohort b, whom it never met, from their first eight. Test rows are not looked
at. A finished variant is kept in --out as a file and not run again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.population import Population, UserRows, rank_rows, read_users, train_population
from plora_ray.data.rows import SPLITS
from plora_ray.evaluation.metrics import log_softmax, row_nll

NEW_USER_EXAMPLES = 8


@dataclass(frozen=True)
class Variant:
    """What differs from the defaults. adapter, training: settings of these sections; prior: of `UserPrior`, as it was estimated."""

    adapter: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    prior: Mapping[str, Any] = field(default_factory=dict)


FEED_FORWARD = ("intermediate.dense", "output.dense")
VARIANTS = {
    "the defaults": Variant(),
    "query": Variant({"targets": ("query",)}),
    "value": Variant({"targets": ("value",)}),
    "attention output": Variant({"targets": ("attention.output.dense",)}),
    "feed-forward": Variant({"targets": ("intermediate.dense",)}),
    "all layers": Variant({"targets": ("query", "key", "value", *FEED_FORWARD)}),
    "top two blocks": Variant({"top_layers": 2}),
    "head hears nothing": Variant({"head_terms": "none"}),
    "head hears tastes": Variant({"head_terms": "taste"}),
    "rank 16": Variant({"rank": 16}),
    "rank 128": Variant({"rank": 128}),
    "rank 256": Variant({"rank": 256}),
    "d = 16": Variant({"user_dim": 16}),
    "d = 256": Variant({"user_dim": 256}),
    "dropout 0.1": Variant({"dropout": 0.1}),
    "personalised dropout 0": Variant(training={"user_dropout": 0.0}),
    "personalised dropout 0.3": Variant(training={"user_dropout": 0.3}),
    "mutual information 0.1": Variant(training={"mutual_information": {"weight": 0.1}}),
    "vectors at half the rate": Variant(training={"user_learning_rate": 0.005}),
    "vectors at twice the rate": Variant(training={"user_learning_rate": 0.02}),
    "all else at half the rate": Variant(training={"learning_rate": 5e-4}),
    "all else at twice the rate": Variant(training={"learning_rate": 2e-3}),
    "four passes": Variant(training={"epochs": 4}),
    "logits as trained": Variant(training={"calibrate": False}),
    "all of a fit lasts": Variant(prior={"lasting": 1.0, "forgetting": None}),
}


def main(
    data: Annotated[Path, typer.Argument(help="A parquet file.")] = Path("../shared/data/crehate_en.parquet"),
    out: Annotated[Path, typer.Option(help="Where results are kept.")] = Path("var/ablation"),
    seeds: Annotated[str, typer.Option(help="Population stages to repeat all with, comma between.")] = "0,1,2",
    only: Annotated[list[str] | None, typer.Option(help="Variants, by name; all by default.")] = None,
    known_users: Annotated[int, typer.Option(help="Users of cohort a.")] = 120,
    new_users: Annotated[int, typer.Option(help="Users of cohort b, at most.")] = 200,
    rows: Annotated[int, typer.Option(help="Training rows a known user has at most.")] = 16,
    epochs: Annotated[int, typer.Option(help="Passes of the population stage.")] = 2,
    max_length: Annotated[int, typer.Option(help="Tokens a text is cut to.")] = 48,
) -> None:
    """Train, fit, score, print a line a variant and seed, then the means."""
    if unknown := set(only or ()) - set(VARIANTS):
        raise typer.BadParameter(f"there is no variant {sorted(unknown)[0]}: {', '.join(VARIANTS)}")
    out.mkdir(parents=True, exist_ok=True)
    cohorts = read_users(data, max_length)
    known = chosen_users(cohorts["a"], known_users, rows)
    new = chosen_users(cohorts["b"], new_users, NEW_USER_EXAMPLES, judged=1)
    options = {"known": [len(user.ids) for user in known], "new": [len(user.ids) for user in new], "epochs": epochs, "tokens": max_length}
    found: dict[str, list[dict[str, float]]] = {}
    for seed in (int(text) for text in seeds.split(",")):
        for name in only or VARIANTS:
            kept = out / f"{data.stem}-{seed}-{_slug(name)}.json"
            if not kept.exists():
                kept.write_text(json.dumps({"options": options, "figures": _tried(VARIANTS[name], known, new, seed, epochs)}))
            finished = json.loads(kept.read_text())
            if finished["options"] != options:
                raise typer.BadParameter(f"{kept} was made with other options: give another --out")
            found.setdefault(name, []).append(finished["figures"])
            print(json.dumps({"variant": name, "seed": seed, **found[name][-1]}), flush=True)
    for name, values in found.items():
        means = {figure: round(float(np.mean([value[figure] for value in values])), 4) for figure in values[0]}
        print(f"| {name} | " + " | ".join(f"{means[figure]:.4f}" for figure in means) + " |", flush=True)


def chosen_users(users: list[UserRows], count: int, rows: int, judged: int = 2) -> list[UserRows]:
    """The first users with so many training rows, of which they keep so many, and two validation rows; test rows are left behind.

    Every validation row, or every other one (`judged` 1, 2), takes the place of a test row: it is what is judged, and nothing is
    calibrated or fitted by it.
    """
    fit = [user for user in users if len(user.of_split("train")) >= rows and len(user.of_split("validation")) > 1]
    return [_judged(user.take(user.of_split("train", rows) + user.of_split("validation")), judged) for user in fit[:count]]


def _judged(user: UserRows, step: int) -> UserRows:
    splits = list(user.splits)
    for place in user.of_split("validation")[::step]:
        splits[place] = SPLITS.index("test")
    return replace(user, splits=splits)


def _tried(variant: Variant, known: list[UserRows], new: list[UserRows], seed: int, epochs: int) -> dict[str, float]:
    began = time.monotonic()
    population = train_population(known, epochs=epochs, seed=seed, adapter=variant.adapter, training=variant.training)
    assert population.prior is not None
    population = replace(population, prior=replace(population.prior, **variant.prior))
    return {**_scored(population, known, "known"), **_scored(population, new, "new"), "seconds": round(time.monotonic() - began, 1)}


def _scored(population: Population, users: list[UserRows], who: str) -> dict[str, float]:
    """Mean NLL of judged rows without and with the user, and accuracy with."""
    rows = rank_rows(users, population.labels)
    judged = rows.of_split("test")
    owners, truth = rows.row_users[judged], rows.labels[judged].numpy()
    passes = population.passes(rows)
    without = row_nll(log_softmax(passes.population_logits(judged).numpy()), truth)
    scores = log_softmax(passes.user_logits(judged, population.fit(users), torch.from_numpy(owners)).numpy())
    with_user = row_nll(scores, truth)
    return {
        f"{who}_population_nll": round(float(without.mean()), 4), f"{who}_nll": round(float(with_user.mean()), 4),
        f"{who}_accuracy": round(float((scores.argmax(1) == truth).mean()), 4),
    }  # fmt: skip


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)


if __name__ == "__main__":
    typer.run(main)
