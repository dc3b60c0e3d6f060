"""Pictures of a training job as PNG bytes. Knows histories, gains and matplotlib; doesn't know files or HTML."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from plora_ray.evaluation.comparison import WITH_USER
from plora_ray.evaluation.plots import COLOURS, METRIC_NAMES, as_png
from plora_ray.training.scores import REMAINING_EDGES, RowBucket
from plora_ray.training.telemetry.history import History
from plora_ray.training.telemetry.sample import Sample

TIME_BINS = 60
SMOOTHING = 0.02  # share of the points that a smoothed loss is the mean of


def progress(history: History) -> bytes:
    """Loss over steps, and users finished over time; restarts are dotted lines."""
    figure = Figure(figsize=(9.6, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _loss(left, history)
    _users(right, history)
    return as_png(figure)


def _loss(axes: Axes, history: History) -> None:
    points = [(sample.step, sample.loss) for sample in history.samples if sample.step is not None]
    steps, losses = (np.array(column) for column in zip(*points, strict=True)) if points else (np.empty(0), np.empty(0))
    axes.plot(steps, losses, color=COLOURS[WITH_USER], linewidth=1, alpha=0.4, marker="." if len(points) < 40 else None)
    width = int(SMOOTHING * len(points))
    if width > 1:
        smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
        axes.plot(steps[width - 1 :], smooth, color=COLOURS[WITH_USER], linewidth=1.8)
    axes.set_title("Population loss", fontsize=10)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _users(axes: Axes, history: History) -> None:
    stage = _user_stage(history.samples)
    if len(stage) > 1:
        times, users = np.array([s.seconds for s in stage]), np.array([s.users_done for s in stage])
        edges = np.linspace(times[0], max(times[-1], times[0] + 1e-3), min(TIME_BINS, len(stage)) + 1)
        rate = np.diff(np.interp(edges, times, users)) / np.diff(edges)
        axes.stairs(rate, edges / 60, color=COLOURS[WITH_USER], fill=True, alpha=0.85)
        for start in history.starts[1:]:
            if edges[0] <= start.seconds <= edges[-1]:
                axes.axvline(start.seconds / 60, color="black", linestyle=":", linewidth=1)
    axes.set_ylim(bottom=0)
    axes.set_title("Users fitted per second", fontsize=10)
    axes.set_xlabel("minutes of training")


def _user_stage(samples: Sequence[Sample]) -> list[Sample]:
    """The samples in which users were finished, from the last one of the population stage on."""
    first = next((index for index, sample in enumerate(samples) if sample.step is None), len(samples))
    return list(samples[max(0, first - 1) :])


def gain_by_training_rows(buckets: Sequence[RowBucket]) -> bytes:
    """What users gain, by how many training rows they have, with 95 % intervals; groups of one user have none."""
    metrics = list(buckets[0].gains)
    figure = Figure(figsize=(4.8 * len(metrics), 3.2), layout="constrained")
    names = [f"{bucket.first}" if bucket.first == bucket.last else f"{bucket.first}–{bucket.last}" for bucket in buckets]
    for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        gains = [bucket.gains[metric] for bucket in buckets]
        means = np.array([gain.mean for gain in gains])
        spread = [means - [gain.low for gain in gains], [gain.high for gain in gains] - means]
        axes.errorbar(range(len(buckets)), means, np.maximum(spread, 0), fmt="o", color=COLOURS[WITH_USER], capsize=3, markersize=4)
        axes.axhline(0, color="black", linewidth=1)
        axes.set_xticks(
            range(len(buckets)), [f"{name}\n({bucket.users:,})" for name, bucket in zip(names, buckets, strict=True)], fontsize=8
        )
        axes.set_xlabel("training rows of the user (users)")
        axes.set_title(f"gain in {METRIC_NAMES[metric].partition(' (')[0]}", fontsize=10)
    return as_png(figure)


def remaining(users: np.ndarray) -> bytes:
    """Users [20] by the share of the prior's variance that their rows have left."""
    figure = Figure(figsize=(6.4, 2.8), layout="constrained")
    axes = figure.subplots()
    axes.stairs(users, 100 * REMAINING_EDGES, color=COLOURS[WITH_USER], fill=True, alpha=0.85)
    axes.set_xlabel("uncertainty left, % of the prior's variance (100: nothing was learned of the user)")
    axes.set_ylabel("users")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("Uncertainty that remains, per user", fontsize=10)
    return as_png(figure)
