"""How ranks tell of their work: an actor that adds it up for the driver, and live metrics for Prometheus.

Uses Ray's actors and metrics; Ray Train itself stays in job.py, whose `report` is handed in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ray
from ray.util.metrics import Counter, Gauge

from plora_ray.training.population import StepsDone
from plora_ray.training.progress import Snapshot, StepPoint
from plora_ray.training.rank import ModelHeld
from plora_ray.training.user_stage import WaveDone

KEPT_POINTS = 10_000  # until the driver has fetched them; it looks twice a second


@ray.remote(num_cpus=0)
class ProgressBoard:
    """Where ranks note their progress and the driver reads it."""

    def __init__(self, users_done: int, users: int) -> None:
        self._snapshot = Snapshot(users_done=users_done, users=users)
        self._groups: list[str] = []
        self._waves: set[int] = set()
        self._losses: dict[int, float] = {}
        self._points: list[StepPoint] = []
        self._first_point = 0

    def on_model(self, group: str, rank: int, model: ModelHeld) -> None:
        """A rank of a group of workers has built its model; a new group is a new start."""
        if group not in self._groups:
            self._groups.append(group)
            self._snapshot.starts += 1
            self._snapshot.parameter_bytes_held.clear()
            self._losses.clear()
        if group == self._groups[-1]:
            self._snapshot.sharding, self._snapshot.ranks = model.sharding, model.ranks
            self._snapshot.parameter_bytes = model.parameter_bytes
            self._snapshot.parameter_bytes_held[rank] = model.parameter_bytes_held

    def on_steps(self, rank: int, done: StepsDone) -> None:
        self._snapshot.rows += done.rows
        self._losses[rank] = done.loss
        if rank == 0:
            loss = sum(self._losses.values()) / len(self._losses)  # ranks step together, so the others' are as new
            self._snapshot.step, self._snapshot.steps, self._snapshot.loss = done.step, done.steps, loss
            self._points.append(StepPoint(done.step, loss, done.learning_rate))
            surplus = len(self._points) - KEPT_POINTS
            if surplus > 0:
                self._drop(surplus)

    def on_wave(self, done: WaveDone) -> None:
        if done.wave not in self._waves:
            self._waves.add(done.wave)
            self._snapshot.users_done += done.users
            self._snapshot.rows += done.rows

    def snapshot(self, seen_points: int = 0) -> Snapshot:
        """Everything so far, with the loss curve's points from number `seen_points` on; those before it are forgotten."""
        self._drop(seen_points - self._first_point)
        return replace(self._snapshot, points=list(self._points), points_before=self._first_point)

    def _drop(self, points: int) -> None:
        if points > 0:
            del self._points[:points]
            self._first_point += points


class RankObserver:
    """Tells the board, Prometheus, and at the points where all ranks are in step Ray Train.

    group: one name for all workers that were started together. report: ray.train.report. Labels of the metrics are the
    generation and the rank, never a user.
    """

    def __init__(self, board: Any, group: str, rank: int, generation: str, report: Callable[[dict[str, Any]], None]) -> None:
        self._board, self._group, self._rank, self._report = board, group, rank, report
        tags = {"generation": generation, "rank": str(rank)}
        self._rows = _tagged(Counter, "rows_total", "Training rows gone through, in both stages", tags)
        self._users = _tagged(Counter, "users_total", "Users finished: fitted, or carried over unchanged", tags)
        self._waves = _tagged(Counter, "waves_total", "Waves of users finished", tags)
        self._loss = _tagged(Gauge, "loss", "Mean population loss of this rank's newest steps", tags)
        self._step_seconds = _tagged(Gauge, "step_seconds", "Mean seconds of the newest population steps", tags)
        self._parameter_bytes = _tagged(Gauge, "parameter_bytes", "Bytes of model parameters held by this rank", tags)
        self._metrics: dict[str, Any] = {"rank": rank, "users": 0}

    def on_model(self, model: ModelHeld) -> None:
        self._board.on_model.remote(self._group, self._rank, model)
        self._parameter_bytes.set(model.parameter_bytes_held)
        self._metrics["parameter_bytes_held"] = model.parameter_bytes_held

    def on_steps(self, done: StepsDone) -> None:
        self._board.on_steps.remote(self._rank, done)
        self._rows.inc(done.rows)
        self._loss.set(done.loss)
        self._step_seconds.set(done.step_seconds)
        self._metrics |= {"loss": done.loss, "step": done.step, "rows_per_s": done.rows_per_s}

    def on_wave(self, done: WaveDone) -> None:
        self._board.on_wave.remote(done)
        self._waves.inc()
        if done.users:  # an erased user may have been the wave's only one
            self._users.inc(done.users)
        if done.rows:  # users who came over unchanged have none
            self._rows.inc(done.rows)
        self._metrics["users"] += done.users

    def in_step(self) -> None:
        self._report(dict(self._metrics))


def _tagged(kind: type[Any], name: str, description: str, tags: dict[str, str]) -> Any:
    metric = kind(f"plora_train_{name}", description=description, tag_keys=tuple(tags))
    metric.set_default_tags(tags)
    return metric
