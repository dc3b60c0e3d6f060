"""Users fitted an hour: this system's waves against PEFT, one user after the other, on the same rows.

    python -m benchmarks.users [DATA.parquet] [--quick] [--json]

DATA has columns user_id, text, label, split, cohort.

Both start from the same trained population and fit the same new users, whom it never met, on the same rows. Each side gets as
many epochs as it needs to reach the held-out likelihood that both can reach. PEFT's learning rate is the best of three for
these users, chosen beforehand and not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor

from benchmarks.figures import Figure, seconds, spread
from benchmarks.one_by_one import OneByOne
from benchmarks.population import Population, UserRows, rank_rows, read_users, train_population
from plora_ray.evaluation.metrics import log_softmax, row_nll
from plora_ray.training.rank_rows import RankRows

EXAMPLES = 16  # training rows of each user
ADAPTERS: dict[str, dict[str, Any]] = {"plora": {"rank": 16}, "lora": {"kind": "lora", "rank": 8}}
LEARNING_RATES = (1e-4, 3e-4, 1e-3)
MOST_EPOCHS = 5


def users_per_hour(population: Population, users: list[UserRows], *, name: str, goal: float, rounds: int) -> list[Figure]:
    """The ratio of users an hour over `rounds` groups of users, and both sides' held-out NLL."""
    trained = [user.take(user.of_split("train")) for user in users]
    tested = [user.take(user.of_split("test")) for user in users]
    opponent = best_opponent(population, trained, tested)
    ours, theirs = _ours_by_epoch(population, users), nll_by_epoch(opponent, trained, tested, "PEFT")
    common = max(min(ours), min(theirs))
    our_epochs, epochs = epochs_to_reach(common, ours), epochs_to_reach(common, theirs)
    ratios, ours_rate, theirs_rate = [], [], []
    for turn, group in enumerate(np.array_split(np.arange(len(users)), rounds)):
        members = [trained[place] for place in group]
        sides = {
            "ours": lambda members=members: _fit(population, rank_rows(members, population.labels), our_epochs),
            "theirs": lambda members=members: _one_by_one(opponent, members, epochs),
        }
        taken = {side: seconds(sides[side]) for side in (sorted(sides) if turn % 2 else sorted(sides, reverse=True))}
        ratios.append(taken["theirs"] / taken["ours"])
        ours_rate.append(3600 * len(members) / taken["ours"])
        theirs_rate.append(3600 * len(members) / taken["theirs"])
    return [
        spread(name, ratios, unit="ratio", goal=goal),
        spread(f"{name}.ours", ours_rate, unit="users/h", goal=None),
        spread(f"{name}.peft", theirs_rate, unit="users/h", goal=None),
        Figure(f"{name}.ours_nll{_after(our_epochs) if len(ours) > 1 else ''}", *[round(ours[our_epochs - 1], 4)] * 3, "nats", None),
        Figure(f"{name}.peft_nll{_after(epochs)}", *[round(theirs[epochs - 1], 4)] * 3, "nats", None),
    ]


def best_opponent(population: Population, trained: list[UserRows], tested: list[UserRows]) -> OneByOne:
    """PEFT with the learning rate that reaches the lowest held-out NLL on every fourth user."""
    lowest: tuple[float, OneByOne] | None = None
    for rate in LEARNING_RATES:
        candidate = OneByOne(population, learning_rate=rate)
        best = min(nll_by_epoch(candidate, trained[::4], tested[::4], f"PEFT at {rate:g}"))
        lowest = min((best, candidate), lowest or (best, candidate), key=lambda found: found[0])
    assert lowest is not None
    return lowest[1]


def nll_by_epoch(opponent: OneByOne, trained: list[UserRows], tested: list[UserRows], told: str) -> list[float]:
    """Held-out NLL over all test rows after 1 ... MOST_EPOCHS epochs."""
    sums, rows = np.zeros(MOST_EPOCHS), 0
    for train, test in track(list(zip(trained, tested, strict=True)), description=told, transient=True, console=Console(stderr=True)):
        opponent.reset()
        rows += len(test.labels)
        for epoch in range(MOST_EPOCHS):
            opponent.fit(train, 1)
            sums[epoch] += float(opponent.nll(test).sum())
    return (sums / rows).tolist()


def epochs_to_reach(nll: float, by_epoch: list[float]) -> int:
    """The first number of epochs with an NLL of at most `nll`, which one of them has."""
    return 1 + next(epoch for epoch, value in enumerate(by_epoch) if value <= nll)


def _after(epochs: int) -> str:
    return f"_after_{epochs}_epoch{'s' if epochs > 1 else ''}"


def _one_by_one(opponent: OneByOne, members: list[UserRows], epochs: int) -> None:
    for user in members:
        opponent.reset()
        opponent.fit(user, epochs)


def _fit(population: Population, rows: RankRows, epochs: int) -> Tensor:
    """Vectors [users, width]. epochs: of Adam; Newton's method has none."""
    steps = None if population.prior is not None else replace(population.adam_steps, epochs=epochs)
    return population.fitter(rows, population.passes(rows), steps).fit(np.arange(len(rows.keys))).vectors


def _ours_by_epoch(population: Population, users: list[UserRows]) -> list[float]:
    """Held-out NLL after 1 ... epochs of Adam; one value where there are no epochs."""
    rows = rank_rows([user.take(user.of_split("train") + user.of_split("test")) for user in users], population.labels)
    test = rows.of_split("test")
    reached = []
    for epochs in range(1, 2 if population.prior is not None else MOST_EPOCHS + 1):
        vectors = _fit(population, rows, epochs)
        logits = population.passes(rows).user_logits(test, vectors, torch.from_numpy(rows.row_users[test]))
        reached.append(float(row_nll(log_softmax(logits.numpy()), rows.labels[test].numpy()).mean()))
    return reached


@dataclass(frozen=True)
class Difference:
    """Largest absolute difference of user vectors and of their logits."""

    vectors: float
    logits: float


def alone_and_among(population: Population, users: list[UserRows], *, among: int, watched: int, seed: int) -> Difference:
    """Fit `among` made-up users, whose rows are drawn from all users', together; then some of them each alone."""
    generator = np.random.default_rng(seed)
    pool = [(user, place) for user in users for place in user.of_split("train")]
    crowd = [_made_up([pool[row] for row in generator.integers(len(pool), size=4)]) for _ in range(among)]
    rows = rank_rows(crowd, population.labels)
    together = population.fit_rows(rows)
    largest = [0.0, 0.0]
    for user in generator.choice(among, size=watched, replace=False):
        single = rank_rows([crowd[user]], population.labels)
        alone = population.fit_rows(single)
        own = single.of_split("train")
        pass_over = population.passes(single)
        owner = torch.zeros(len(own), dtype=torch.int64)
        logits = [pass_over.user_logits(own, vectors, owner) for vectors in (alone, together[user : user + 1])]
        largest[0] = max(largest[0], float((alone[0] - together[user]).abs().max()))
        largest[1] = max(largest[1], float((logits[0] - logits[1]).abs().max()))
    return Difference(*largest)


def _made_up(rows: list[tuple[UserRows, int]]) -> UserRows:
    return UserRows(*([getattr(user, name)[place] for user, place in rows] for name in ("ids", "labels", "splits", "times")))


def main(
    data: Annotated[Path, typer.Argument(help="A parquet file.")] = Path("../shared/data/crehate_en.parquet"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer users.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Train both kinds' populations on cohort a, fit users of cohort b."""
    cohorts = read_users(data, max_length=64)
    known = cohorts["a"][: 120 if quick else 400]
    fit = [user for user in cohorts["b"] if len(user.of_split("train")) >= EXAMPLES and user.of_split("test")][: 24 if quick else None]
    new = [user.take(user.of_split("train", EXAMPLES) + user.of_split("test")) for user in fit]
    goals = {"plora": ("users_per_hour_vs_peft", 5.0), "lora": ("users_per_hour_vs_peft_lora_kind", 2.0)}
    for kind, (name, goal) in goals.items():
        population = train_population(known, epochs=1 if quick else 2, seed=0, adapter=ADAPTERS[kind])
        for figure in users_per_hour(population, new, name=name, goal=goal, rounds=2 if quick else 4):
            figure.emit(as_json)
        if kind == "plora":
            found = alone_and_among(population, known, among=500 if quick else 5000, watched=20, seed=0)
            for part, value in (("vectors", found.vectors), ("logits", found.logits)):
                Figure(f"alone_vs_among_{part}", value, 0.0, value, "largest absolute difference", 1e-4).emit(as_json)


if __name__ == "__main__":
    typer.run(main)
