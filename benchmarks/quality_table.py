"""Predictions of several seeds as one table: every predictor's figures with intervals over users, and what ours gains over it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from plora_ray.evaluation.comparison import POPULATION, compare
from plora_ray.evaluation.metrics import Floats, Ints, log_softmax, row_nll
from plora_ray.evaluation.user_gains import UserGains

SUBJECTS = {"full": "with_user", "few": "with_user", "zero": POPULATION}


@dataclass(frozen=True, eq=False)
class Point:
    """One seed's predictions on one protocol's rows: log-probabilities [rows, classes] by predictor, labels and users [rows]."""

    protocol: str
    examples: int | None
    predicted: dict[str, Floats]
    labels: Ints
    users: Ints

    def to_json(self) -> dict[str, Any]:
        predicted = {name: np.round(values, 5).tolist() for name, values in self.predicted.items()}
        return {**vars(self), "predicted": predicted, "labels": self.labels.tolist(), "users": self.users.tolist()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Point:
        predicted = {name: np.array(found) for name, found in values["predicted"].items()}
        return cls(values["protocol"], values["examples"], predicted, np.array(values["labels"]), np.array(values["users"]))

    def harmed(self, name: str) -> float | None:
        """Share of users who lose by predictor `name` against the population beyond noise, of those with rows enough to tell."""
        gains = row_nll(self.predicted[POPULATION], self.labels) - row_nll(self.predicted[name], self.labels)
        _, places = np.unique(self.users, return_inverse=True)
        judged = UserGains.of(np.bincount(places, gains), np.bincount(places, gains**2), np.bincount(places))
        return judged.harmed if judged.judged else None


def lines_of(
    runs: Sequence[Sequence[Point]], costs: Sequence[dict[str, Any]], calibrations: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """One line a protocol and predictor. Seeds are pooled; intervals and p by users as a whole, so that a user's seeds count as one.

    Both are of these seeds: how far trainings differ is in gain_of_seeds. over_population: the same of each predictor against `population`.

    calibrations: of each run, by trained baseline, the fields of its RivalCalibration.
    """
    lines = []
    for first in runs[0]:
        points = [next(point for point in run if (point.protocol, point.examples) == (first.protocol, first.examples)) for run in runs]
        predicted = {name: np.concatenate([point.predicted[name] for point in points]) for name in first.predicted}
        labels, users = (np.concatenate([getattr(point, what) for point in points]) for what in ("labels", "users"))
        subject = SUBJECTS[first.protocol]
        found = compare(subject, predicted, labels, users, "classification")
        subject_of_seeds = [row_nll(point.predicted[subject], point.labels).mean() for point in points]
        for name, scores in found.predictors.items():
            gain = found.gains[name]["nll"] if name != subject else None
            harmed = [value for point in points if (value := point.harmed(name)) is not None] if name != POPULATION else []
            of_seeds = [row_nll(point.predicted[name], point.labels).mean() for point in points]
            lines.append({
                "protocol": first.protocol, "examples": first.examples, "predictor": name, "seeds": len(points),
                "users": found.users, "rows": len(first.labels),
                "accuracy": scores.intervals["accuracy"].to_json(), "nll": scores.intervals["nll"].to_json(),
                "nll_of_seeds": [round(float(value), 5) for value in of_seeds],
                "nll_as_trained": as_trained(name, points, calibrations),
                "macro_f1": macro_f1(predicted[name].argmax(1), labels, users),
                "gain": None if gain is None else gain.to_json(),
                "gain_of_seeds": [round(float(other - own), 5) for other, own in zip(of_seeds, subject_of_seeds, strict=True)],
                "over_population": None if name == POPULATION else over_population(name, predicted, labels, users),
                "harmed": round(float(np.mean(harmed)), 4) if harmed else None,
                "cost": costs[0].get(name), "ms": _milliseconds(costs, name),
            })  # fmt: skip
    return lines


def lines_of_runs(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """`lines_of` seeds as benchmarks.quality keeps them. rates: of a baseline whose learning rate was chosen, the factor of each seed."""
    points = [[Point.from_json(point) for point in run["points"]] for run in runs]
    lines = lines_of(points, [run["costs"] for run in runs], [run["calibrations"] for run in runs])
    tried = [run.get("rates", {}) for run in runs]
    return [{**line, "rates": [found[line["predictor"]]["taken"] for found in tried if line["predictor"] in found]} for line in lines]


def over_population(name: str, predicted: dict[str, Floats], labels: Ints, users: Ints) -> dict[str, float]:
    """What predictor `name` gains in NLL over the population's answer; p not adjusted for others."""
    both = {which: predicted[which] for which in (name, POPULATION)}
    return compare(name, both, labels, users, "classification").gains[POPULATION]["nll"].to_json()


def as_trained(name: str, points: Sequence[Point], calibrations: Sequence[dict[str, Any]]) -> float | None:
    """Mean NLL over seeds of a trained baseline as it was before it was calibrated; None for what wasn't."""
    losses = []
    for point, found in zip(points, calibrations, strict=True):
        if name not in found:
            return None
        used = found[name]["known" if point.examples is None else "new"]
        base = np.array(used["base"])
        logits = base + (point.predicted[name] - base) / used["scale"]  # the constant that softmax took away doesn't matter
        losses.append(row_nll(log_softmax(logits), point.labels).mean())
    return round(float(np.mean(losses)), 5)


def macro_f1(answers: Ints, labels: Ints, users: Ints, draws: int = 1000) -> dict[str, float]:
    """Mean of the classes' F1, with a 95 % interval over whole users drawn again."""
    names, places = np.unique(users, return_inverse=True)
    classes = np.unique(labels)
    counts = np.zeros((3, len(names), len(classes)))  # right, answered, true; [users, classes]
    for column, value in enumerate(classes):
        hit = (answers == value, labels == value)
        for place, rows in enumerate((hit[0] & hit[1], *hit)):
            counts[place, :, column] = np.bincount(places, rows, len(names))
    weights = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), draws)
    weights = np.vstack([np.ones(len(names)), weights])
    right, answered, true = (weights @ part for part in counts)  # [draws, classes]
    scores = (2 * right / np.maximum(answered + true, 1)).mean(axis=1)
    low, high = np.percentile(scores[1:], [2.5, 97.5])
    return {"mean": round(float(scores[0]), 5), "low": round(float(low), 5), "high": round(float(high), 5)}


def _milliseconds(costs: Sequence[dict[str, Any]], name: str) -> float | None:
    times = [cost[name]["seconds_per_request"] for cost in costs if name in cost]
    return round(1000 * float(np.median(times)), 2) if times else None


def markdown(lines: Sequence[dict[str, Any]]) -> str:
    """A table a protocol, and one of what each predictor costs."""
    parts = []
    for point in dict.fromkeys((line["protocol"], line["examples"]) for line in lines):
        mine = [line for line in lines if (line["protocol"], line["examples"]) == point]
        title = f"{point[0]}-shot" + (f", {point[1]} examples" if point[1] else "")
        seeds = f"{mine[0]['seeds']} seed{'s' if mine[0]['seeds'] > 1 else ''}"
        parts.append(f"\n{title}: {mine[0]['users']} users, {mine[0]['rows']} test rows, {seeds}\n")
        parts.append("| predictor | NLL | as trained | accuracy | macro F1 | ours gains, NLL | by seed | p | harmed |\n" + "|---" * 9 + "|")
        for line in mine:
            gain = line["gain"]
            raw = line["nll_as_trained"]
            cells = [line["predictor"], _spread(line["nll"]), "" if raw is None else f"{raw:.3f}"]
            cells += [_spread(line[name]) for name in ("accuracy", "macro_f1")]
            seeds_apart = ", ".join(f"{value:+.3f}" for value in line["gain_of_seeds"])
            told = f"{gain['mean']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})" if gain else ""
            cells += [told, seeds_apart, f"{gain['p']:.2g}"] if gain else ["", "", ""]
            parts.append("| " + " | ".join([*cells, "" if line["harmed"] is None else f"{100 * line['harmed']:.0f} %"]) + " |")
    costs = {line["predictor"]: (line["cost"], line["ms"]) for line in lines if line["cost"]}
    parts.append("\n| predictor | parameters a user | in all | stored MB | ms a text, alone |\n|---|---|---|---|---|")
    for name, (cost, ms) in costs.items():
        counts = f"{cost['parameters_per_user']:,} | {cost['parameters_in_all']:,} | {cost['stored_bytes'] / 1e6:.2f}"
        parts.append(f"| {name} | {counts} | {ms:.1f} |")
    taken = {line["predictor"]: ", ".join(f"{factor:g}" for factor in line["rates"]) for line in lines if line.get("rates")}
    if taken:
        parts.append("\nLearning rates, times the usual, by seed: " + "; ".join(f"{name} {told}" for name, told in taken.items()) + ".")
    return "\n".join(parts)


def _spread(value: dict[str, float]) -> str:
    return f"{value['mean']:.3f} ({value['low']:.3f}–{value['high']:.3f})"
