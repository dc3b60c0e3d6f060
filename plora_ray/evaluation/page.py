"""The one page that reports are: a verdict, sections, tables and pictures, in one file that needs no other. No user, no text.

Knows comparisons and HTML; doesn't know which report it draws.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape

from plora_ray.evaluation.comparison import LABEL_PRIOR, MAJORITY, POPULATION, SHOWN_BELOW, WITH_USER, Comparison, examples_told
from plora_ray.evaluation.costs import COST, COST_OF_LIKELIEST
from plora_ray.evaluation.metrics import SMALL
from plora_ray.evaluation.predictor_cost import PredictorCost

PREDICTORS = {
    WITH_USER: "with user",
    POPULATION: "without user (population)",
    LABEL_PRIOR: "the user's own labels, no text",
    MAJORITY: "everybody's labels, no text",
    "population-lora": "PEFT LoRA for everybody",
    "lora-per-user": "PEFT LoRA for each user",
    "user-identifier-ia3": "user as text, IA3",
    "user-identifier-bitfit": "user as text, BitFit",
    "user-identifier-prefix": "user as text, prefix tuning",
    "plora-released": "PLoRA as released",
    "plora-end-to-end": "PLoRA end to end, our rates",
    "shuffled-users": "ours, users shuffled",
}
METRICS = {
    "accuracy": "accuracy", "macro_f1": "macro F1", "nll": "NLL", "brier": "Brier", "ece": "ECE", "mse": "MSE", "rmse": "RMSE",
    "mae": "MAE", "kappa": "kappa", "r2": "R²", COST: "cost of the decision", COST_OF_LIKELIEST: "cost of the likeliest class",
}  # fmt: skip
INTERVALS = (
    "Intervals: 95 %, bootstrap over whole users. Gains are paired on the same rows; positive is better for every metric. p: of no gain, "
    "users as a whole, adjusted for the predictors compared, and in a table of groups or times for those, too (Holm); coloured below "
    f"{SHOWN_BELOW}."
)
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem;border-bottom:1px solid #ddd}
.verdict{background:#eef4fa;border-left:4px solid #1a6fb5;padding:.8rem 1rem}
table{border-collapse:collapse;margin:.6rem 0;display:block;overflow-x:auto}
td,th{padding:.25rem .7rem;text-align:right;border-bottom:1px solid #eee}
th:first-child,td:first-child{text-align:left}tr.subject{font-weight:600;background:#f6f9fc}
small,.interval{color:#777;font-weight:400}.interval{display:block;font-size:.85em;white-space:nowrap}.better{color:#17803d}.worse{color:#b3261e}img{max-width:100%}
"""


def page(title: str, verdict: str, lead: str, sections: Sequence[str], footnote: str) -> str:
    """A whole document. title, verdict, footnote: plain text; lead, sections: HTML."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style></head><body>\n'
        f'<h1>{escape(title)}</h1>\n{lead}\n<p class="verdict">{escape(verdict)}</p>\n'
        + "\n".join(sections)
        + f"\n<p><small>{escape(footnote)}</small></p>\n</body></html>\n"
    )


def picture(name: str, png: bytes) -> str:
    """A PNG inside the page. name: what is read out in its place."""
    return f'<p><img alt="{escape(name)}" src="data:image/png;base64,{base64.b64encode(png).decode()}"></p>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain texts in a table, with a line of headings unless there are none."""
    lines = [_line("th", head)] if head else []
    return "<table>" + "".join([*lines, *(_line("td", row) for row in rows)]) + "</table>"


def _line(kind: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{kind}>{escape(cell)}</{kind}>" for cell in cells) + "</tr>"


def comparison_table(comparison: Comparison) -> str:
    """Predictors down, metrics across, and at the right what the subject gains over each."""
    metrics = [name for name in comparison.predictors[comparison.subject].figures if name != "rows"]
    gained = list(next(iter(comparison.gains.values()), {}))
    head = ["", *(METRICS[name] for name in metrics), *(f"gain over it, {METRICS[name]}" for name in gained)]
    lines = []
    for name, title in PREDICTORS.items():
        if name in comparison.predictors:
            cells = [title, *(_score(comparison, name, metric) for metric in metrics)]
            cells += [_gain(comparison, name, metric) if name in comparison.gains else "" for metric in gained]
            subject = ' class="subject"' if name == comparison.subject else ""
            lines.append(f"<tr{subject}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    shots = f"{examples_told(comparison.examples)} a user: " if comparison.examples else ""
    header, body = "".join(f"<th>{cell}</th>" for cell in head), "".join(lines)
    return f"<p>{shots}{comparison.rows:,} test rows of {comparison.users:,} users</p>\n<table><tr>{header}</tr>{body}</table>"


def costs_table(costs: Mapping[str, PredictorCost], comparison: Comparison) -> str:
    """Predictors down; what each reaches on the rows of `comparison`, its parameters, bytes and the time of a request."""
    metrics = list(comparison.predictors[comparison.subject].intervals)
    head = ["", *(METRICS[name] for name in metrics), "parameters a user", "parameters in all", "stored MB", "ms a text, alone"]
    rows = []
    for name, title in PREDICTORS.items():
        if name in costs and name in comparison.predictors:
            cost, figures = costs[name], comparison.predictors[name].figures
            reached = [f"{figures[metric]:.4f}" for metric in metrics]
            numbers = [
                f"{cost.size.per_user:,}",
                f"{cost.size.in_all:,}",
                f"{cost.size.stored_bytes / 1e6:,.2f}",
                f"{1000 * cost.seconds_per_request:.1f}",
            ]
            rows.append([title, *reached, *numbers])
    return table(head, rows)


def groups_table(groups: Mapping[str, Comparison]) -> str:
    """Groups down; their users, rows, the population's and the user's figures, and the gain. For judging whether all gain alike."""
    first = next(iter(groups.values()))
    metrics, personal = list(first.predictors[POPULATION].intervals), first.subject == WITH_USER
    head = ["", "users", "rows", *(f"without user, {METRICS[name]}" for name in metrics)]
    head += [column for name in metrics if personal for column in (f"with user, {METRICS[name]}", f"gain, {METRICS[name]}")]
    lines = []
    for name, comparison in sorted(groups.items()):
        cells = [escape(name), f"{comparison.users:,}", f"{comparison.rows:,}"]
        cells += [_score(comparison, POPULATION, metric) for metric in metrics]
        for metric in metrics if personal else ():
            cells += [_score(comparison, WITH_USER, metric), _gain(comparison, POPULATION, metric)]
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"<table><tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>{''.join(lines)}</table>"


def _score(comparison: Comparison, name: str, metric: str) -> str:
    predictor = comparison.predictors[name]
    value = number(metric, float(predictor.figures[metric]))
    interval = predictor.intervals.get(metric) if comparison.users > 1 else None  # one user drawn again is the same one
    return f'{value} <span class="interval">{number(metric, interval.low)}–{number(metric, interval.high)}</span>' if interval else value


def _gain(comparison: Comparison, over: str, metric: str) -> str:
    gain = comparison.gains[over][metric]
    shown = gain.p < SHOWN_BELOW
    kind = "better" if shown and gain.mean > 0 else "worse" if shown and gain.mean < 0 else "interval"
    mean, low, high = (number(metric, value, sign="+") for value in (gain.mean, gain.low, gain.high))
    if comparison.users == 1:
        return f'<span class="interval">{mean}, one user</span>'
    return f'<span class="{kind}">{mean}</span> <span class="interval">{low} to {high}, p&nbsp;{gain.p:.2g}</span>'


def number(metric: str, value: float, sign: str = "") -> str:
    """A figure of a metric as pages show it."""
    if metric == "accuracy":
        return f"{100 * value:{sign}.1f}&nbsp;%"
    return f"{value:{sign}.3g}" if 0 < abs(value) < SMALL else f"{value:{sign}.4f}"
