"""Pictures of an evaluation as PNG bytes: who gains how much, and how the answers improve with a user's examples.

Knows comparisons and matplotlib; doesn't know files or HTML.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from plora_ray.evaluation.comparison import LABEL_PRIOR, POPULATION, WITH_USER, Comparison
from plora_ray.evaluation.costs import COST, COST_OF_LIKELIEST
from plora_ray.evaluation.metrics import Floats
from plora_ray.evaluation.user_gains import HISTOGRAM_BINS

COLOURS = {WITH_USER: "#1a6fb5", POPULATION: "#777777", LABEL_PRIOR: "#c98a1b"}
NAMES = {WITH_USER: "with user", POPULATION: "without user", LABEL_PRIOR: "the user's own labels"}
WORSE = "#b3261e"
GAIN_NAMES = {
    "nll": "fall of the user's negative log-likelihood",
    "mse": "fall of the user's mean squared error",
    "accuracy": "rise of the user's accuracy",
}
METRIC_NAMES = {
    "nll": "negative log-likelihood (less is better)", "mse": "mean squared error (less is better)", "accuracy": "accuracy",
    COST: "cost of the decision (less is better)", COST_OF_LIKELIEST: "cost of the likeliest class (less is better)",
}  # fmt: skip


def gain_histograms(gains: Mapping[str, Floats]) -> bytes:
    """By metric, a histogram of the users' own gains [users] over the population; users without a difference have a bar of their own."""
    figure = Figure(figsize=(6.4 if len(gains) == 1 else 4.8 * len(gains), 3.4), layout="constrained")
    for axes, (metric, values) in zip(figure.subplots(1, len(gains), squeeze=False)[0], gains.items(), strict=True):
        _gain_histogram(axes, metric, values)
    return as_png(figure)


def _gain_histogram(axes: Axes, metric: str, gains: Floats) -> None:
    low, high = np.percentile(gains, [0.5, 99.5])
    width = max(high - low, 1e-6) / HISTOGRAM_BINS
    bins = np.rint(np.clip(gains, low, high) / width)  # the middle one is centred on zero
    places, users = np.unique(bins, return_counts=True)
    colours = [WORSE if place < 0 else COLOURS[WITH_USER] if place > 0 else COLOURS[POPULATION] for place in places]
    axes.bar(places * width, users, width=width, color=colours, alpha=0.85)
    axes.axvline(float(gains.mean()), color="black", linewidth=1.2, linestyle="--", label="mean over users")
    axes.set_xlabel(GAIN_NAMES[metric])
    axes.set_ylabel("users")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    better, worse = (gains > 0).mean(), (gains < 0).mean()
    axes.set_title(f"{better:.0%} of {len(gains):,} users better off, {worse:.0%} worse", fontsize=10)
    axes.legend(frameon=False)


def few_shot_curves(points: Sequence[Comparison]) -> bytes:
    """Each metric over the number of examples, with 95 % intervals."""
    metrics = list(points[0].predictors[WITH_USER].intervals)
    figure = Figure(figsize=(4.6 * len(metrics), 3.4), layout="constrained")
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        _curve(axes, points, metric)
    panels[0].legend(frameon=False, fontsize=8)
    return as_png(figure)


def _curve(axes: Axes, points: Sequence[Comparison], metric: str) -> None:
    shots = [point.examples or 0 for point in points]
    for name, colour in COLOURS.items():
        if any(name not in point.predictors for point in points):
            continue
        intervals = [point.predictors[name].intervals[metric] for point in points]
        axes.plot(shots, [interval.mean for interval in intervals], color=colour, marker="o", markersize=4, label=NAMES[name])
        axes.fill_between(shots, [i.low for i in intervals], [i.high for i in intervals], color=colour, alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(shots, [str(count) for count in shots])
    axes.set_xlabel("examples of the user")
    axes.set_title(METRIC_NAMES[metric], fontsize=10)


def gain_over_time(periods: Mapping[str, Comparison]) -> bytes:
    """By metric, what the user gains over the population in each part of the test's time, with 95 % intervals."""
    found = [periods[name].gains[POPULATION] for name in sorted(periods)]
    figure = Figure(figsize=(4.6 * len(found[0]), 3.4), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(found[0]), squeeze=False)[0], found[0], strict=True):
        means, lows, highs = (np.array([getattr(gains[metric], end) for gains in found]) for end in ("mean", "low", "high"))
        parts = np.arange(1, len(found) + 1)
        axes.errorbar(
            parts, means, np.maximum([means - lows, highs - means], 0), color=COLOURS[WITH_USER], marker="o", markersize=4, capsize=3
        )
        axes.axhline(0, color=COLOURS[POPULATION], linewidth=1)
        axes.set_xticks(parts)
        axes.set_xlabel("part of the test's time")
        axes.set_title(f"gain in {metric}", fontsize=10)
    return as_png(figure)


def as_png(figure: Figure) -> bytes:
    """Drawn without pyplot, whose global state isn't safe in threads and needs a display on some machines."""
    buffer = BytesIO()
    FigureCanvasAgg(figure)  # attaches itself
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
