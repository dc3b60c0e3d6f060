"""TensorBoard event files of a job. tensorboardX stands behind this file.

Loss and learning rate over steps; what is done and how fast over seconds of training; gains and scores at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from plora_ray.training.telemetry.sample import Sample


class TensorBoardSink:
    """folder: one run's; a job that resumes adds a file to it."""

    name = "training.tensorboard_dir"

    def __init__(self, folder: Path) -> None:
        self._writer = SummaryWriter(str(folder))

    def write(self, samples: Sequence[Sample]) -> None:
        for sample in samples:
            if sample.step is not None:
                self._writer.add_scalar("population/loss", sample.loss, sample.step)
                self._writer.add_scalar("population/learning_rate", sample.learning_rate, sample.step)
            second = round(sample.seconds)
            for name in ("rows_per_s", "users_per_s", "users_done"):
                self._writer.add_scalar(f"throughput/{name}", getattr(sample, name), second)
        self._writer.flush()

    def finish(self, report: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        test = report.get("test", {})
        for predictor in ("with_user", "without_user", "user_label_prior"):
            for metric, value in test.get(predictor, {}).items():
                if metric != "rows":
                    self._writer.add_scalar(f"test/{metric}/{predictor}", value, 0)
        for metric, gains in test.get("user_gains", {}).items():
            self._histogram(f"gain_per_user/{metric}", gains["edges"], gains["users"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _histogram(self, name: str, edges: Sequence[float], users: Sequence[int]) -> None:
        """A histogram that is counted already; its moments from the bins' middles."""
        middles = [(low + high) / 2 for low, high in zip(edges, edges[1:], strict=False)]
        total = sum(middle * count for middle, count in zip(middles, users, strict=True))
        squares = sum(middle**2 * count for middle, count in zip(middles, users, strict=True))
        self._writer.add_histogram_raw(
            name, min=edges[0], max=edges[-1], num=sum(users), sum=total, sum_squares=squares,
            bucket_limits=list(edges[1:]), bucket_counts=list(users), global_step=0,
        )  # fmt: skip
