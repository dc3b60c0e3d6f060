"""An evaluation as files: report.json for programs, report.html and PNG plots for people. Aggregates only: no user, no text.

report.html stands alone (style and pictures inside), so it can be mailed or kept as a build's artefact.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from plora_ray.adapters.labels import LabelSpace
from plora_ray.errors import ConfigError
from plora_ray.evaluation.comparison import POPULATION, Comparison, examples_told
from plora_ray.evaluation.cost_page import CostPage
from plora_ray.evaluation.page import (
    INTERVALS,
    METRICS,
    PREDICTORS,
    comparison_table,
    costs_table,
    groups_table,
    number,
    page,
    picture,
    table,
)
from plora_ray.evaluation.plots import few_shot_curves, gain_histograms, gain_over_time
from plora_ray.evaluation.predictor_cost import PredictorCost
from plora_ray.evaluation.rivals.calibrations import RivalCalibration
from plora_ray.evaluation.rivals.rates import TriedRates
from plora_ray.evaluation.verdict import verdict

GAIN_PLOT, FEW_PLOT, TIME_PLOT = "gain_per_user.png", "few_shot.png", "gain_over_time.png"
TITLES = {
    "full": "Full-shot: trained users",
    "few": "Few-shot: new users with a few examples",
    "zero": "Zero-shot: new users without examples",
    "time": "By time: trained on the past, tested on the future",
}


@dataclass(frozen=True)
class ProtocolResult:
    """One protocol: a comparison, or for few-shot one for each number of examples; or why there is none. note: what is missing.

    groups: the comparison on the rows of each group, where the data has a column of groups; few-shot: after the most examples.
    periods: on the rows of each part of the time.
    """

    name: str
    comparisons: tuple[Comparison, ...] = ()
    skipped: str | None = None
    note: str | None = None
    groups: Mapping[str, Comparison] = field(default_factory=dict)
    periods: Mapping[str, Comparison] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        if self.skipped:
            return {"status": "skipped", "reason": self.skipped}
        found = [comparison.to_json() for comparison in self.comparisons]
        note = {"note": self.note} if self.note else {}
        divided = {"groups": self.groups, "periods": self.periods}
        groups = {key: {name: part.to_json() for name, part in parts.items()} for key, parts in divided.items() if parts}
        return {"status": "evaluated", **note, **({"points": found} if self.name == "few" else found[0]), **groups}


@dataclass(frozen=True)
class Evaluation:
    """Everything a report says. data: what was measured on, as plain values. costs: of a million users, if there are prices.

    predictor_costs: by predictor. calibrations: by trained baseline that was calibrated. rates: by
    trained baseline whose learning rate was chosen among several.
    """

    generation: str
    model: str
    labels: LabelSpace
    data: dict[str, Any]
    results: tuple[ProtocolResult, ...]
    costs: CostPage | None = None
    predictor_costs: Mapping[str, PredictorCost] = field(default_factory=dict)
    calibrations: Mapping[str, RivalCalibration] = field(default_factory=dict)
    rates: Mapping[str, TriedRates] = field(default_factory=dict)

    def comparisons(self, protocol: str) -> Sequence[Comparison]:
        """The protocol's comparisons; none if it was skipped or not asked for."""
        return next((result.comparisons for result in self.results if result.name == protocol), ())

    def verdict(self) -> str:
        full, zero = self.comparisons("full") or self.comparisons("time"), self.comparisons("zero")
        return verdict(full[0] if full else None, self.comparisons("few"), zero[0] if zero else None)

    def to_json(self) -> dict[str, Any]:
        return {
            "generation": self.generation,
            "model": self.model,
            "labels": self.labels.to_json(),
            "data": self.data,
            "verdict": self.verdict(),
            "protocols": {result.name: result.to_json() for result in self.results},
            **({"costs": self.costs.to_json()} if self.costs else {}),
            "predictor_costs": {name: cost.to_json() for name, cost in self.predictor_costs.items()},
            "calibrations": {name: asdict(found) for name, found in self.calibrations.items()},
            "baseline_rates": {name: tried.to_json() for name, tried in self.rates.items()},
        }


def write_report(evaluation: Evaluation, out: Path) -> dict[str, Any]:
    """Write all files into the directory `out` and return what report.json holds. Raises ConfigError if it can't be written."""
    plots = _plots(evaluation)
    report = {**evaluation.to_json(), "plots": list(plots)}
    files = {**plots, "report.json": (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode()}
    files["report.html"] = render_html(evaluation, plots).encode()
    try:
        for name in (GAIN_PLOT, FEW_PLOT, TIME_PLOT):  # an earlier run's picture beside this run's numbers would mislead
            (out / name).unlink(missing_ok=True)
        for name, content in files.items():
            (out / name).write_bytes(content)
    except OSError as error:
        raise ConfigError(f"the report can't be written to {out}: {error.strerror or error}") from error
    return report


def _plots(evaluation: Evaluation) -> dict[str, bytes]:
    full, few = evaluation.comparisons("full"), evaluation.comparisons("few")
    plots = {GAIN_PLOT: gain_histograms({full[0].loss: full[0].user_gains.means})} if full and full[0].user_gains else {}
    plots |= {FEW_PLOT: few_shot_curves(few)} if few else {}
    periods = next((result.periods for result in evaluation.results if result.periods), {})
    return plots | ({TIME_PLOT: gain_over_time(periods)} if periods else {})


def render_html(evaluation: Evaluation, plots: dict[str, bytes]) -> str:
    """The page, with the plots inside."""
    pictures = {name: picture(name, png) for name, png in plots.items()}
    sections = [_section(result, pictures) for result in evaluation.results]
    measured = [comparison for result in evaluation.results for comparison in result.comparisons]
    costs = evaluation.predictor_costs
    notes = f"{_scales(evaluation)}{_rates(evaluation)}"
    spent = f"<h2>What the predictors cost</h2>\n{costs_table(costs, measured[0])}{notes}" if costs else ""
    data = table([], [[name.replace("_", " "), _plain(value)] for name, value in evaluation.data.items()])
    return page(
        f"Evaluation of generation {evaluation.generation}",
        evaluation.verdict(),
        f"<p>Model {escape(evaluation.model)}, {escape(evaluation.labels.task)}.</p>",
        [*sections, spent, *([evaluation.costs.to_html()] if evaluation.costs else []), f"<h2>Data</h2>\n{data}"],
        f"{INTERVALS} Everybody's labels are those of all training rows in this data.",
    )


def _scales(evaluation: Evaluation) -> str:
    if not evaluation.calibrations:
        return ""
    scales = {name: (found.known.scale, found.new.scale) for name, found in evaluation.calibrations.items()}
    shown = "; ".join(f"{PREDICTORS[name]}: {known:.2f} and {new:.2f}" for name, (known, new) in scales.items())
    told = f"Trained baselines are calibrated: validation rows chose the scales of their logits for known and for new users ({shown})."
    return f"<p>{escape(told)}</p>"


def _rates(evaluation: Evaluation) -> str:
    if not evaluation.rates:
        return ""
    shown = "; ".join(f"{PREDICTORS[name]}: {tried.taken:g}" for name, tried in evaluation.rates.items())
    factors = " or ".join(f"{factor:g}" for factor in next(iter(evaluation.rates.values())).losses)
    told = f"Trained baselines learn at the rate that suits them: validation rows chose {factors} times the usual one ({shown})."
    return f"<p>{escape(told)}</p>"


def _section(result: ProtocolResult, pictures: dict[str, str]) -> str:
    head = f"<h2>{TITLES[result.name]}</h2>"
    if result.skipped:
        return f"{head}\n<p>Skipped: {escape(result.skipped)}.</p>"
    picture = pictures.get({"full": GAIN_PLOT, "few": FEW_PLOT, "time": TIME_PLOT}.get(result.name, ""), "")
    note = f"<p>{escape(result.note)}.</p>" if result.note else ""
    groups = [f"<h3>By group{_after(result.groups)}</h3>", groups_table(result.groups)] if result.groups else []
    periods = ["<h3>By age of the rows</h3>", groups_table(result.periods)] if result.periods else []
    tables = [f"{comparison_table(comparison)}{_of_users(comparison)}" for comparison in result.comparisons]
    return "\n".join([head, picture, note, *tables, *groups, *periods])


def _after(groups: Mapping[str, Comparison]) -> str:
    examples = next(iter(groups.values())).examples
    return f", after {examples_told(examples)}" if examples else ""


def _of_users(comparison: Comparison) -> str:
    """The same when every user counts alike, and what becomes of those who gain least."""
    loss, gains = comparison.loss, comparison.user_gains
    told = [f"{PREDICTORS[name]} {number(loss, comparison.predictors[name].by_user[loss])}" for name in (comparison.subject, POPULATION)]
    text = f"When every user counts alike, {METRICS[loss]} is: {', '.join(dict.fromkeys(told))}."
    if gains is not None:
        text += f" The tenth of the users who gain least: {number(loss, gains.worst_decile, sign='+')} a row in the mean, noise included."
    return f"<p><small>{escape(text)}</small></p>"


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} = {found}" for name, found in value.items()) or "none"
    return f"{value:,}" if isinstance(value, int) else str(value)
