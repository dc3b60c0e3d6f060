"""What happens to the gain, and to the harmed, when users' rows are not as they should be; with the guard and without.

    python -m benchmarks.robustness [DATA] [--seeds 2] [--users 60] [--json]

DATA: synthetic:// (made-up users, drawn anew with every seed) or a parquet file with columns user_id, text, label, split, cohort;
with a column `language` too, users of some languages are also fitted by a population that never met their language.

Every scenario spoils rows of some users, trains a population on all of them, fits everybody and scores the test rows. Users keep
at most as many rows as --rows says. Harmed: test rows lost to the population by more than noise (evaluation/user_gains.py).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow.parquet as pq
import torch
import typer

from benchmarks.population import UNDATED, UserRows, rank_rows, read_users, synthetic_users, train_population
from benchmarks.spoilt import SPOILT, Spoil
from plora_ray.evaluation.metrics import bootstrap_ratios, log_softmax, row_nll
from plora_ray.evaluation.user_gains import UserGains
from plora_ray.training.fitters import NewtonFitter

SHOTS = 16  # of users whose language the population never met
TOP_LAYERS = 2  # have adapters: a scenario takes a minute, not three


@dataclass
class Gains:
    """What users gain over the population, in nats a test row: sums, squares, rows by user. guarded: whom the guard sends back.

    losses: sums of the NLL with the user, without the guard.
    """

    users: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    sums: list[float] = field(default_factory=list)
    squares: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    guarded: list[bool] = field(default_factory=list)

    def extend(self, other: Gains) -> None:
        """The same users under another seed count as one in the interval."""
        for name, values in vars(other).items():
            getattr(self, name).extend(values)

    def of(self, places: np.ndarray) -> Gains:
        """Only these users."""
        return Gains(**{name: np.array(values)[places].tolist() for name, values in vars(self).items()})

    def line(self, *, guard: bool) -> dict[str, object]:
        """Figures, with the guard or without."""
        keeps = ~np.array(self.guarded, bool) if guard else np.ones(len(self.users), bool)
        sums, squares, rows = np.array(self.sums) * keeps, np.array(self.squares) * keeps, np.array(self.rows)
        gains = UserGains.of(sums, squares, rows)
        low, high = _interval(self.users, sums, rows)
        losses = np.array(self.losses) + np.array(self.sums) * ~keeps  # a guarded user's is the population's
        figures = {
            "nll": losses.sum() / rows.sum(),
            "gain": sums.sum() / rows.sum(), "low": low, "high": high, "harmed": gains.harmed, "helped": gains.helped,
            "guarded": 1 - keeps.mean(),
        }  # fmt: skip
        rounded = {name: None if np.isnan(value) else round(float(value), 4) for name, value in figures.items()}
        return {"guard": guard, "users": len(rows), "judged": gains.judged, **rounded}


def fitted_gains(known: list[UserRows], fitted: list[UserRows], numbers: list[int], seed: int, epochs: int) -> Gains:
    """Train a population on `known`, fit the users `fitted` on their training rows, and score their test rows."""
    population = train_population(known, epochs=epochs, seed=seed, adapter={"top_layers": TOP_LAYERS})
    assert population.prior is not None
    rows = rank_rows(fitted, population.labels)
    passes, test = population.passes(rows), rows.of_split("test")
    with_guard, without_guard = (NewtonFitter(passes, rows, population.prior, "classification", guard=guard) for guard in (True, False))
    owners = rows.row_users[test]
    found = with_guard.fit(np.arange(len(fitted)))
    back, vectors = found.guarded, found.vectors
    harmed = np.flatnonzero(back.numpy())  # what they would have had
    vectors[back] = without_guard.fit(harmed).vectors
    truth = rows.labels[test].numpy()
    logits = passes.population_logits(test), passes.user_logits(test, vectors, torch.from_numpy(owners))
    without, personal = (row_nll(log_softmax(scores.double().numpy()), truth) for scores in logits)
    gain = without - personal
    sums, squares = (np.bincount(owners, weights=values, minlength=len(fitted)) for values in (gain, gain**2))
    counts = np.bincount(owners, minlength=len(fitted))
    losses = np.bincount(owners, weights=personal, minlength=len(fitted))
    return Gains(numbers, losses.tolist(), sums.tolist(), squares.tolist(), counts.tolist(), back.tolist())


def _interval(users: list[int], sums: np.ndarray, rows: np.ndarray) -> tuple[float, float]:
    """95 % interval of the mean over rows; lines of the same user, under several seeds, are drawn together."""
    _, person = np.unique(users, return_inverse=True)
    pooled = np.stack([np.bincount(person, weights=values) for values in (sums, rows)], axis=1)
    return bootstrap_ratios(pooled[:, :1], pooled[:, 1])[0]


def raised(gains: Gains, over: Gains) -> dict[str, object]:
    """How much higher the NLL of the same users' answers is in `gains` than in `over`, a test row, with a 95 % interval over users."""
    more, rows = np.array(gains.losses) - np.array(over.losses), np.array(gains.rows)
    low, high = _interval(gains.users, more, rows)
    figures = {"nll_raised": more.sum() / rows.sum(), "low": low, "high": high}
    return {"users": len(np.unique(gains.users)), **{name: round(float(value), 4) for name, value in figures.items()}}


def spoilt_gains(users: list[UserRows], spoil: Spoil, seed: int, epochs: int) -> tuple[Gains, np.ndarray]:
    """Gains of all users where a share of them is spoilt, and who that is [users]."""
    generator = np.random.default_rng(seed)
    chosen = generator.permutation(len(users)) < round(spoil.share * len(users))
    changed = [spoil.change(user, users, generator) if hit else user for user, hit in zip(users, chosen, strict=True)]
    return fitted_gains(changed, changed, list(range(len(users))), seed, epochs), chosen


def language_gains(by_language: dict[str, list[UserRows]], language: str, most: int, seed: int, epochs: int) -> Iterator[tuple[str, Gains]]:
    """Every other user of a language after SHOTS examples, where the population has met the others, and where it has met none.

    Both populations have `most` users.
    """
    own = [user for user in by_language[language] if len(user.of_split("train")) >= SHOTS and user.of_split("test")][:most]
    met, new = own[::2], [user.take(user.of_split("train", SHOTS) + user.of_split("test")) for user in own[1::2]]
    others = [user for name, users in by_language.items() if name != language for user in users]
    others = [others[place] for place in np.random.default_rng(seed).permutation(len(others))[:most]]
    for name, known in ((f"{language} seen", others[: most - len(met)] + met), (f"{language} unseen", others)):
        yield name, fitted_gains(known, new, list(range(len(new))), seed, epochs)


def read(data: str, seed: int, users: int, rows: int, max_length: int) -> list[UserRows]:
    """Users who have rows to train on and to be tested on, cut to `rows`."""
    if data.startswith("synthetic:"):
        return synthetic_users(f"synthetic://?users={users}&texts={rows}&seed={seed}", max_length)
    found = [_cut(user, rows) for user in read_users(Path(data), max_length)["a"]]
    return [user for user in found if user.of_split("train") and user.of_split("test")][:users]


def read_languages(data: Path, rows: int, max_length: int) -> dict[str, list[UserRows]]:
    """By language, users of both cohorts."""
    table = pq.read_table(data, columns=["user_id", "language", "cohort"]).to_pylist()
    order: dict[str, dict[str, str]] = {}
    for row in table:
        order.setdefault(row["cohort"], {}).setdefault(row["user_id"], row["language"])
    found: dict[str, list[UserRows]] = {}
    for cohort, users in read_users(data, max_length).items():
        for user, language in zip(users, order[cohort].values(), strict=True):
            found.setdefault(language, []).append(_cut(user, rows, least=SHOTS))
    return found


def _cut(user: UserRows, rows: int, least: int = 0) -> UserRows:
    """A quarter of the rows are for the test, an eighth for validation, the rest to learn from, or `least` if that is more."""
    train = user.of_split("train", max(least, rows - rows // 4 - rows // 8))
    return user.take(train + user.of_split("validation", rows // 8) + user.of_split("test", rows // 4))


def main(
    data: Annotated[str, typer.Argument(help="synthetic:// or a parquet file.")] = "synthetic://",
    seeds: Annotated[int, typer.Option(help="Populations trained for every scenario.")] = 2,
    users: Annotated[int, typer.Option(help="Users at most.")] = 60,
    rows: Annotated[int, typer.Option(help="Rows of a user at most.")] = 24,
    epochs: Annotated[int, typer.Option(help="Passes of the population stage.")] = 3,
    max_length: Annotated[int, typer.Option(help="Tokens a text is cut to.")] = 128,
    only: Annotated[list[str] | None, typer.Option(help="These scenarios.")] = None,
    undated: Annotated[bool, typer.Option("--undated", help="Nobody knows when rows are from; of scenarios.")] = False,
    language: Annotated[list[str] | None, typer.Option(help="New users of these languages instead.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """A line a scenario, group of users and guard, over all seeds."""
    began = time.perf_counter()
    run = Run(data, seeds, users, rows, epochs, max_length, undated)

    def tell(name: str, whose: str, figures: dict[str, object]) -> None:
        line = {"scenario": name, "whose": whose, **figures, "seconds": round(time.perf_counter() - began)}
        print(json.dumps(line) if as_json else "  ".join(f"{key}={value}" for key, value in line.items()), flush=True)

    found: dict[str, Gains] = {}
    for name, whose, gains in run.languages(language) if language else run.scenarios(only):
        found[name] = gains
        for guard in (False, True):
            tell(name, whose, gains.line(guard=guard))
    for name in language or []:
        tell(f"{name}, unseen instead of seen", f"new, {SHOTS} examples", raised(found[f"{name} unseen"], found[f"{name} seen"]))


@dataclass(frozen=True)
class Run:
    """What is measured: the options of `main`."""

    data: str
    seeds: int
    users: int
    rows: int
    epochs: int
    max_length: int
    undated: bool

    def scenarios(self, only: list[str] | None) -> Iterator[tuple[str, str, Gains]]:
        """Name, whose gains, gains: of everybody, and of those alone whose rows were spoilt."""
        for spoil in (spoil for spoil in SPOILT if not only or spoil.name in only):
            everybody, hit = Gains(), Gains()
            for seed in range(self.seeds):
                gains, chosen = spoilt_gains(self.people(seed), spoil, seed, self.epochs)
                everybody.extend(gains)
                hit.extend(gains.of(chosen))
            yield spoil.name, "all", everybody
            if 0 < spoil.share < 1:
                yield spoil.name, "spoilt", hit

    def people(self, seed: int) -> list[UserRows]:
        """Everybody of a seed, before some are spoilt."""
        found = read(self.data, seed, self.users, self.rows, self.max_length)
        return [replace(user, times=[UNDATED] * len(user.times)) for user in found] if self.undated else found

    def languages(self, languages: list[str]) -> Iterator[tuple[str, str, Gains]]:
        """The same for new users of each language, which the population has met or not."""
        by_language = read_languages(Path(self.data), self.rows, self.max_length)
        for language in languages:
            found: dict[str, Gains] = {}
            for seed in range(self.seeds):
                for name, gains in language_gains(by_language, language, self.users, seed, self.epochs):
                    found.setdefault(name, Gains()).extend(gains)
            yield from ((name, f"new, {SHOTS} examples", gains) for name, gains in found.items())


if __name__ == "__main__":
    typer.run(main)
