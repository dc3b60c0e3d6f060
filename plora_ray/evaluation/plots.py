"""Pictures of an evaluation as PNG bytes: who gains how much, and how the answers improve with a user's examples.

Knows comparisons and matplotlib; doesn't know files or HTML.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from plora_ray.evaluation.comparison import HISTOGRAM_BINS, LABEL_PRIOR, POPULATION, WITH_USER, Comparison

COLOURS = {WITH_USER: "#1a6fb5", POPULATION: "#777777", LABEL_PRIOR: "#c98a1b"}
NAMES = {WITH_USER: "with user", POPULATION: "without user", LABEL_PRIOR: "the user's own labels"}
METRIC_NAMES = {"nll": "negative log-likelihood (less is better)", "mse": "mean squared error (less is better)", "accuracy": "accuracy"}


def gain_per_user(comparison: Comparison) -> bytes:
    """Histogram of the users' own gains over the population."""
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    gains = comparison.user_gains
    low, high = np.percentile(gains, [0.5, 99.5]) if len(gains) > 1 else (gains[0] - 1, gains[0] + 1)
    axes.hist(np.clip(gains, low, high), bins=HISTOGRAM_BINS, color=COLOURS[WITH_USER], alpha=0.85)
    axes.axvline(0, color="black", linewidth=1)
    axes.axvline(float(gains.mean()), color="#b3261e", linewidth=1.5, linestyle="--", label="mean over users")
    loss = "negative log-likelihood" if "nll" in comparison.gains[POPULATION] else "mean squared error"
    axes.set_xlabel(f"reduction of the user's {loss} (right of 0: better)")
    axes.set_ylabel("users")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(f"Gain per user, {(gains > 0).mean():.0%} of {len(gains):,} users are better off", fontsize=10)
    axes.legend(frameon=False)
    return _png(figure)


def few_shot_curves(points: Sequence[Comparison]) -> bytes:
    """Each metric over the number of examples, with 95 % intervals."""
    metrics = list(points[0].predictors[WITH_USER].intervals)
    figure = Figure(figsize=(4.6 * len(metrics), 3.4), layout="constrained")
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        _curve(axes, points, metric)
    panels[0].legend(frameon=False, fontsize=8)
    return _png(figure)


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


def _png(figure: Figure) -> bytes:
    """Drawn without pyplot, whose global state isn't safe in threads and needs a display on some machines."""
    buffer = BytesIO()
    FigureCanvasAgg(figure)  # attaches itself
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
