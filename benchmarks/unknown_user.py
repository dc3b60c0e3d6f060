"""What should a user get of whom nothing is known, and is a user better answered by his likeliest vector or by all that are likely?

    python -m benchmarks.unknown_user ../shared/data/crehate_en.parquet --seeds 0,1,2

Known users of cohort a train the population; every other validation row is judged, of cohort b's users too, whom it never met. Test
rows are not looked at. Averages are over vectors drawn from the prior, or from the posterior that Laplace's approximation gives, with
the linearised model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor
from torch.nn import functional as F

from benchmarks.ablation import NEW_USER_EXAMPLES, chosen_users
from benchmarks.population import Population, UserRows, rank_rows, read_users, train_population
from plora_ray.adapters.fit import Linearisation, UserPrior, solve_users
from plora_ray.adapters.problem import FitProblem, free_logits
from plora_ray.evaluation.metrics import log_softmax, row_nll

DRAWS = 200


def main(
    data: Annotated[Path, typer.Argument(help="A parquet file.")] = Path("../shared/data/crehate_en.parquet"),
    seeds: Annotated[str, typer.Option(help="Population stages to repeat all with, comma between.")] = "0,1,2",
    known_users: Annotated[int, typer.Option(help="Users of cohort a.")] = 120,
    new_users: Annotated[int, typer.Option(help="Users of cohort b.")] = 60,
    rows: Annotated[int, typer.Option(help="Training rows a known user has at most.")] = 16,
    epochs: Annotated[int, typer.Option(help="Passes of the population stage.")] = 3,
    top_layers: Annotated[int | None, typer.Option(help="Adapters in so many blocks only.")] = None,
    max_length: Annotated[int, typer.Option(help="Tokens a text is cut to.")] = 48,
) -> None:
    """Print the NLL of every answer, a line a seed and a group of users, then the means."""
    cohorts = read_users(data, max_length)
    groups = {"known": chosen_users(cohorts["a"], known_users, rows), "new": chosen_users(cohorts["b"], new_users, NEW_USER_EXAMPLES)}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in groups}
    for seed in (int(text) for text in seeds.split(",")):
        population = train_population(groups["known"], epochs=epochs, seed=seed, adapter={"top_layers": top_layers})
        for name, users in groups.items():
            found[name].append(answers(population, users))
            print(json.dumps({"seed": seed, "users": name, **found[name][-1]}), flush=True)
    for name, values in found.items():
        print(json.dumps({"users": name, **{what: round(float(np.mean([value[what] for value in values])), 4) for what in values[0]}}))


def answers(population: Population, users: list[UserRows]) -> dict[str, float]:
    """Mean NLL of the judged rows by each answer."""
    assert population.prior is not None and population.mean is not None
    rows, prior = rank_rows(users, population.labels), population.prior
    passes, everybody = population.passes(rows), np.arange(len(users))
    judged, own = rows.of_split("test"), rows.to_fit(everybody)
    owners, truth = torch.from_numpy(rows.row_users[judged]), rows.labels[judged].numpy()
    linear, texts = passes.linearise(judged, prior.mean)
    given, given_texts = passes.linearise(own, prior.mean)
    known = given, given_texts, rows.labels[own], torch.from_numpy(rows.row_users[own]), len(users), prior
    vectors = solve_users(*known, "classification").vectors.double()
    spread = torch.linalg.inv(FitProblem(*known, "classification").derivatives(vectors)[1])
    unit = torch.randn(DRAWS, len(prior.mean), generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def loss(logits: Tensor) -> float:
        return round(float(row_nll(log_softmax(logits.numpy()), truth).mean()), 4)

    return {
        "zero as trained": loss(passes.user_logits(judged, -population.mean.float().expand(len(users), -1), owners)),
        "mean": loss(passes.population_logits(judged)),
        "averaged over the prior": loss(_averaged(linear, texts, unit @ _root(prior), None)),
        "likeliest vector": loss(passes.user_logits(judged, vectors.float(), owners)),
        "averaged over the posterior": loss(_averaged(linear, texts, unit @ torch.linalg.cholesky(spread).mT[owners], vectors[owners])),
    }


def _root(prior: UserPrior) -> Tensor:
    """L^T [1, d, d] with L L^T the prior's covariance."""
    return torch.linalg.cholesky(torch.linalg.inv(prior.precision)).mT.unsqueeze(0)


def _averaged(linear: Linearisation, texts: Tensor, draws: Tensor, centre: Tensor | None) -> Tensor:
    """Log-probabilities [rows, outputs] averaged over vectors: draws [rows or 1, draws, d] around centre [rows, d]; None: around zero."""
    vectors = draws if centre is None else draws + centre.unsqueeze(1)
    free = free_logits(linear.logits[texts].double(), "classification").unsqueeze(1) + vectors @ linear.jacobian[texts].double().mT
    return torch.log_softmax(F.pad(free, (0, 1)), 2).logsumexp(1) - np.log(draws.shape[1])


if __name__ == "__main__":
    typer.run(main)
