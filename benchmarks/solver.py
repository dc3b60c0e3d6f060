"""Which solver should fit users? Newton on the linearised model against Adam on the true one, under one Gaussian prior.

    python -m benchmarks.solver ../shared/data/crehate_en.parquet [--quick] [--json]

DATA has columns user_id, text, label, split, cohort. The population stage trains on cohort a; users of cohort b, whom it
never met, are fitted from their first 1 to 16 training rows and scored on their test rows, which nobody trained on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor

from benchmarks.population import Population, UserRows, rank_rows, read_users, train_population
from plora_ray.adapters.adam import AdamSteps
from plora_ray.adapters.fit import Linearisation, linearise, solve_users
from plora_ray.config import ADAM_LEARNING_RATES
from plora_ray.evaluation.metrics import log_softmax, paired, row_nll
from plora_ray.training.rank_rows import RankRows

MOST_EXAMPLES = 16
ADAM_EPOCHS = (1, 3, 6)


@dataclass(frozen=True)
class Fitted:
    """vectors: [users, d]. passes: forward and backward passes of one text through the model, as a share of rows x 1 pass."""

    vectors: Tensor
    passes: float


@dataclass(frozen=True)
class Task:
    """The users to fit, from `n` examples each. local: [rows] user of each training row."""

    population: Population
    rows: RankRows
    train: np.ndarray
    local: Tensor
    users: int

    def newton(self, relinearisations: int) -> Fitted:
        """The posterior mode of the model linearised at the prior's mean; then linearised again where each user arrived."""
        population = self.population
        linear, texts = population.passes(self.rows).linearise(self.train, population.prior.mean)
        labels = self.rows.labels[self.train]
        vectors = solve_users(linear, texts, labels, self.local, self.users, population.prior, "classification").vectors
        passes = 2.0 * len(linear.logits)
        for _ in range(relinearisations):
            linear = self._at_each_user(vectors)
            own = torch.arange(len(self.train))
            vectors = solve_users(linear, own, labels, self.local, self.users, population.prior, "classification").vectors
            passes += 2.0 * len(self.train)
        return Fitted(vectors, passes / len(self.train))

    def adam(self, epochs: int) -> Fitted:
        """Adam on the true model under the same prior; no validation rows, so it makes all its epochs."""
        steps = AdamSteps(epochs=epochs, learning_rate=ADAM_LEARNING_RATES["plora"])
        fitter = self.population.fitter(self.rows, self.population.passes(self.rows), steps)
        return Fitted(fitter.fit(np.arange(self.users)).vectors, 2.0 * epochs)

    def _at_each_user(self, vectors: Tensor) -> Linearisation:
        """Linearised at every row's own user's vector: texts can't be shared any more. `point` is [users, d] here."""
        logits, jacobian = [], []
        for start in range(0, len(self.train), 32):
            rows = self.train[start : start + 32]
            ids, mask = self.rows.inputs(rows)
            z, j = linearise(self.population.model, ids, mask, vectors[self.local[start : start + 32]], "classification")
            logits.append(z)
            jacobian.append(j)
        return Linearisation(vectors, torch.cat(logits), torch.cat(jacobian))


def main(
    data: Annotated[Path, typer.Argument(help="A parquet file.")] = Path("../shared/data/crehate_en.parquet"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer users, epochs and example counts.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    seeds: Annotated[int, typer.Option(help="Population stages to repeat all with.")] = 1,
    max_length: Annotated[int, typer.Option(help="Tokens a text is cut to.")] = 64,
    epochs: Annotated[int, typer.Option(help="Passes of the population stage.")] = 2,
    known_users: Annotated[int, typer.Option(help="Users of cohort a who train the population.")] = 400,
) -> None:
    """Fit, score, print a line a method, number of examples and seed."""
    cohorts = read_users(data, max_length)
    known = cohorts["a"][: 150 if quick else known_users]
    new = [user for user in cohorts["b"] if len(user.of_split("train")) >= MOST_EXAMPLES and user.of_split("test")]
    for seed in range(seeds):
        population = train_population(known, epochs=1 if quick else epochs, seed=seed)
        for count in (4, 16) if quick else (1, 4, 16):
            for line in compare(population, new[: 40 if quick else None], count):
                values = {"data": data.stem, "seed": seed, "examples": count, **line}
                print(json.dumps(values) if as_json else "  ".join(f"{name}={value}" for name, value in values.items()), flush=True)


def compare(population: Population, users: list[UserRows], count: int) -> list[dict[str, object]]:
    """A line a method; gains are over the population's own answer, with a 95 % interval bootstrapped by user."""
    chosen = [user.take(user.of_split("train", count) + user.of_split("test")) for user in users]
    rows = rank_rows(chosen, population.labels)
    train, test = rows.of_split("train"), rows.of_split("test")
    task = Task(population, rows, train, torch.from_numpy(rows.row_users[train]), len(users))
    owners, truth = rows.row_users[test], rows.labels[test].numpy()
    scorer = population.passes(rows)
    without = row_nll(log_softmax(scorer.population_logits(test).numpy()), truth)
    lines = []
    for name, fit in methods(task).items():
        began = time.perf_counter()
        fitted = fit()
        seconds = time.perf_counter() - began
        scores = log_softmax(scorer.user_logits(test, fitted.vectors, torch.from_numpy(owners)).numpy())
        lines.append({
            "method": name, "users": len(users), "nll": round(float(row_nll(scores, truth).mean()), 4),
            "accuracy": round(float((scores.argmax(1) == truth).mean()), 4), "population_nll": round(float(without.mean()), 4),
            "nll_gain": paired(row_nll(scores, truth), without, owners), "passes": round(fitted.passes, 2), "seconds": round(seconds, 2),
        })  # fmt: skip
    return lines


def methods(task: Task) -> dict[str, Callable[[], Fitted]]:
    """Every way to fit, by name."""
    prior = task.population.prior
    assert prior is not None
    return {
        "population": lambda: Fitted(torch.zeros(task.users, len(prior.mean)), 0.0),
        "prior mean": lambda: Fitted(prior.mean.float().expand(task.users, -1).clone(), 0.0),
        "newton, 1 linearisation": lambda: task.newton(0),
        "newton, 2 linearisations": lambda: task.newton(1),
        **{f"adam, {epochs} epochs": lambda epochs=epochs: task.adam(epochs) for epochs in ADAM_EPOCHS},
    }


if __name__ == "__main__":
    typer.run(main)
