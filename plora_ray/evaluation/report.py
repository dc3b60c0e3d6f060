"""An evaluation as files: report.json for programs, report.html and PNG plots for people. Aggregates only: no user, no text.

report.html stands alone (style and pictures inside), so it can be mailed or kept as a build's artefact.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from plora_ray.adapters.labels import LabelSpace
from plora_ray.errors import ConfigError
from plora_ray.evaluation.comparison import (
    LABEL_PRIOR,
    MAJORITY,
    POPULATION,
    WITH_USER,
    Comparison,
    Interval,
    PredictorScores,
)
from plora_ray.evaluation.metrics import as_json
from plora_ray.evaluation.plots import few_shot_curves, gain_per_user
from plora_ray.evaluation.verdict import verdict

GAIN_PLOT, FEW_PLOT = "gain_per_user.png", "few_shot.png"
TITLES = {
    "full": "Full-shot: trained users",
    "few": "Few-shot: new users with a few examples",
    "zero": "Zero-shot: new users without examples",
}
PREDICTORS = {
    WITH_USER: "with user",
    POPULATION: "without user (population)",
    LABEL_PRIOR: "the user's own labels, no text",
    MAJORITY: "everybody's labels, no text",
}
METRICS = {"accuracy": "accuracy", "macro_f1": "macro F1", "nll": "NLL", "mse": "MSE", "mae": "MAE", "r2": "R²"}
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem;border-bottom:1px solid #ddd}
.verdict{background:#eef4fa;border-left:4px solid #1a6fb5;padding:.8rem 1rem}
table{border-collapse:collapse;margin:.6rem 0}td,th{padding:.25rem .7rem;text-align:right;border-bottom:1px solid #eee}
th:first-child,td:first-child{text-align:left}tr.subject{font-weight:600;background:#f6f9fc}
small,.interval{color:#777;font-weight:400}.better{color:#17803d}.worse{color:#b3261e}img{max-width:100%}
"""


@dataclass(frozen=True)
class ProtocolResult:
    """One protocol: a comparison, or for few-shot one for each number of examples; or why there is none. note: what is missing."""

    name: str
    comparisons: tuple[Comparison, ...] = ()
    skipped: str | None = None
    note: str | None = None

    def to_json(self) -> dict[str, Any]:
        if self.skipped:
            return {"status": "skipped", "reason": self.skipped}
        found = [comparison.to_json() for comparison in self.comparisons]
        note = {"note": self.note} if self.note else {}
        return {"status": "evaluated", **note, **({"points": found} if self.name == "few" else found[0])}


@dataclass(frozen=True)
class Evaluation:
    """Everything a report says. data: what was measured on, as plain values."""

    generation: str
    model: str
    labels: LabelSpace
    data: dict[str, Any]
    results: tuple[ProtocolResult, ...]

    def comparisons(self, protocol: str) -> Sequence[Comparison]:
        """The protocol's comparisons; none if it was skipped or not asked for."""
        return next((result.comparisons for result in self.results if result.name == protocol), ())

    def verdict(self) -> str:
        full, zero = self.comparisons("full"), self.comparisons("zero")
        return verdict(full[0] if full else None, self.comparisons("few"), zero[0] if zero else None)

    def to_json(self) -> dict[str, Any]:
        return {
            "generation": self.generation,
            "model": self.model,
            "labels": self.labels.to_json(),
            "data": self.data,
            "verdict": self.verdict(),
            "protocols": {result.name: result.to_json() for result in self.results},
        }


def write_report(evaluation: Evaluation, out: Path) -> dict[str, Any]:
    """Write all files into the directory `out` and return what report.json holds. Raises ConfigError if it can't be written."""
    plots = _plots(evaluation)
    report = {**evaluation.to_json(), "plots": list(plots)}
    try:
        for name in (GAIN_PLOT, FEW_PLOT):  # an earlier run's picture beside this run's numbers would mislead
            (out / name).unlink(missing_ok=True)
        for name, png in plots.items():
            (out / name).write_bytes(png)
        (out / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        (out / "report.html").write_text(render_html(evaluation, plots), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"the report can't be written to {out}: {error.strerror or error}") from error
    return report


def _plots(evaluation: Evaluation) -> dict[str, bytes]:
    full, few = evaluation.comparisons("full"), evaluation.comparisons("few")
    plots = {GAIN_PLOT: gain_per_user(full[0])} if full else {}
    return {**plots, FEW_PLOT: few_shot_curves(few)} if few else plots


def render_html(evaluation: Evaluation, plots: dict[str, bytes]) -> str:
    """The page, with the plots inside."""
    pictures = {name: _picture(name, png) for name, png in plots.items()}
    sections = [_section(result, pictures) for result in evaluation.results]
    named = [(escape(name.replace("_", " ")), escape(_plain(value))) for name, value in evaluation.data.items()]
    data = "".join(f"<tr><td>{name}</td><td>{value}</td></tr>" for name, value in named)
    title = f"Evaluation of generation {escape(evaluation.generation)}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head><body>\n'
        f"<h1>{title}</h1>\n<p>Model {escape(evaluation.model)}, {escape(evaluation.labels.task)}.</p>\n"
        f'<p class="verdict">{escape(evaluation.verdict())}</p>\n' + "\n".join(sections) + "\n<h2>Data</h2>\n<table>" + data + "</table>\n"
        "<p><small>Intervals: 95 %, bootstrap over whole users. Gains are paired on the same rows; positive is better for every metric. "
        "Everybody's labels are those of all training rows in this data.</small></p>\n</body></html>\n"
    )


def _picture(name: str, png: bytes) -> str:
    return f'<p><img alt="{escape(name)}" src="data:image/png;base64,{base64.b64encode(png).decode()}"></p>'


def _section(result: ProtocolResult, pictures: dict[str, str]) -> str:
    head = f"<h2>{TITLES[result.name]}</h2>"
    if result.skipped:
        return f"{head}\n<p>Skipped: {escape(result.skipped)}.</p>"
    picture = pictures.get({"full": GAIN_PLOT, "few": FEW_PLOT}.get(result.name, ""), "")
    note = f"<p>{escape(result.note)}.</p>" if result.note else ""
    return "\n".join([head, picture, note, *(_table(comparison) for comparison in result.comparisons)])


def _table(comparison: Comparison) -> str:
    """Predictors down, metrics across, and at the right what the subject gains over each."""
    metrics = [name for name in as_json(comparison.predictors[comparison.subject].scores) if name != "rows"]
    gained = list(next(iter(comparison.gains.values()), {}))
    head = ["", *(METRICS[name] for name in metrics), *(f"gain over it, {METRICS[name]}" for name in gained)]
    lines = []
    for name, title in PREDICTORS.items():
        if name in comparison.predictors:
            cells = [title, *(_score(comparison.predictors[name], metric) for metric in metrics)]
            cells += [_gain(metric, comparison.gains[name][metric]) if name in comparison.gains else "" for metric in gained]
            subject = ' class="subject"' if name == comparison.subject else ""
            lines.append(f"<tr{subject}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    shots = f"{comparison.examples} example{'' if comparison.examples == 1 else 's'} a user: " if comparison.examples else ""
    header, body = "".join(f"<th>{cell}</th>" for cell in head), "".join(lines)
    return f"<p>{shots}{comparison.rows:,} test rows of {comparison.users:,} users</p>\n<table><tr>{header}</tr>{body}</table>"


def _score(predictor: PredictorScores, metric: str) -> str:
    value = _number(metric, float(getattr(predictor.scores, metric)))
    interval = predictor.intervals.get(metric)
    return f'{value} <span class="interval">{_number(metric, interval.low)}–{_number(metric, interval.high)}</span>' if interval else value


def _gain(metric: str, gain: Interval) -> str:
    kind = "better" if gain.low > 0 else "worse" if gain.high < 0 else "interval"
    return (
        f'<span class="{kind}">{_number(metric, gain.mean, sign="+")}</span> '
        f'<span class="interval">{_number(metric, gain.low, sign="+")} to {_number(metric, gain.high, sign="+")}</span>'
    )


def _number(metric: str, value: float, sign: str = "") -> str:
    return f"{100 * value:{sign}.1f}&nbsp;%" if metric == "accuracy" else f"{value:{sign}.4f}"


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} = {found}" for name, found in value.items()) or "none"
    return f"{value:,}" if isinstance(value, int) else str(value)
