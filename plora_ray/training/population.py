"""The population stage: what all users share (A, B, P, q and the head) and a first vector for every user this rank owns.

Private matrices start from the population's, so their population stage is one LoRA for all, without users.

Mixed-user batches; shared parameters go through the DeepSpeed engine, user vectors through the rank's own table.
Checkpointed at the end of every epoch, for any number of ranks afterwards.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from plora_ray.adapters.schedule import learning_rate_factor
from plora_ray.config import TrainingSettings
from plora_ray.data.batches import token_budget_batches
from plora_ray.errors import PloraError
from plora_ray.training.activations import Below, whole_passes
from plora_ray.training.checkpoints import PopulationCheckpoints
from plora_ray.training.engine import ShardedTrainer
from plora_ray.training.rank_rows import RankRows
from plora_ray.training.user_table import UserTable

REPORT_EVERY_STEPS = 10


class TrainingDiverged(PloraError):
    """The loss is no number any more."""


@dataclass(frozen=True)
class StepsDone:
    """One rank's steps since its last report, the newest of which was `step` of `steps`.

    loss: mean over `count` of them; rows: that this rank went through; seconds: that they took together.
    """

    step: int
    steps: int
    count: int
    loss: float
    learning_rate: float
    rows: int
    seconds: float

    @property
    def step_seconds(self) -> float:
        return self.seconds / self.count

    @property
    def rows_per_s(self) -> float:
        return self.rows / max(self.seconds, 1e-9)


@dataclass
class _SinceReport:
    """What was done since the last report. losses: of steps with rows."""

    losses: list[Tensor] = field(default_factory=list)
    count: int = 0
    rows: int = 0
    began: float = field(default_factory=time.monotonic)


@dataclass
class PopulationStage:
    """One rank's part of the stage. `rank` and `seed` only decide the order in which rows are met.

    table: None without users. below: see LowerActivations.under. An epoch draws the same numbers whether the job was stopped before
    it or not.
    """

    trainer: ShardedTrainer
    rows: RankRows
    table: UserTable | None
    settings: TrainingSettings
    rank: int
    checkpoints: PopulationCheckpoints
    on_steps: Callable[[StepsDone], None]
    on_epoch: Callable[[], None]
    below: Below = whole_passes

    def run(self) -> None:
        """Train from the last checkpoint, or from the start, to the last epoch. All ranks must call."""
        epoch, step = self.checkpoints.restore(self.trainer, self.rows, self.table)
        while epoch < self.settings.epochs:
            seed = (self.settings.seed * 1009 + epoch) * 65537 + self.rank
            torch.manual_seed(seed)  # dropout; ranks draw differently
            step = self._epoch(self._batches(seed), step)
            epoch += 1
            self.checkpoints.save(epoch, step, self.trainer, self.rows, self.table)
            self.on_epoch()

    def _batches(self, seed: int) -> list[np.ndarray]:
        rows = draw_share(self.rows.of_split("train"), self.settings.population_fraction, seed)
        groups = token_budget_batches(
            self.rows.lengths[rows], max_tokens=self.settings.batch_tokens, max_rows=self.settings.batch_rows, shuffle_seed=seed
        )
        return [rows[group] for group in groups]

    def _epoch(self, batches: list[np.ndarray], step: int) -> int:
        self.trainer.engine.train()
        steps_in_all = -1
        since, factor = _SinceReport(), 0.0
        for rows, real, passes in self.trainer.lockstep(batches, np.empty(0, np.int64), collective=True):
            if steps_in_all < 0:
                steps_in_all = max(step + passes, passes * self.settings.epochs)
            factor = learning_rate_factor(step, steps_in_all, self.settings.warmup_fraction)
            loss = self._step(rows, factor)
            step += 1
            since.count, since.rows = since.count + 1, since.rows + len(rows)
            if real:
                since.losses.append(loss)
            if step % REPORT_EVERY_STEPS == 0:
                since = self._report(step, steps_in_all, factor, since)
        self._report(step, steps_in_all, factor, since)
        return step

    def _report(self, step: int, steps_in_all: int, factor: float, since: _SinceReport) -> _SinceReport:
        """Tell of the steps since the last report, unless they were none or idle, and begin to count anew."""
        if not since.losses:
            return since
        mean = torch.stack(since.losses).mean().item()
        if not math.isfinite(mean):
            raise TrainingDiverged(f"the training loss became {mean} at step {step}: lower training.learning_rate or use model.dtype=fp32")
        rate, seconds = self.settings.learning_rate * factor, time.monotonic() - since.began
        self.on_steps(StepsDone(step, steps_in_all, since.count, mean, rate, since.rows, seconds))
        return _SinceReport()

    def _step(self, rows: np.ndarray, factor: float) -> Tensor:
        batch = self.rows.batch(rows, self.trainer.device)
        vectors = None if self.table is None else self.table.gather(batch.users, self.trainer.device)

        def forward(engine: nn.Module) -> Tensor:
            return engine(batch.input_ids, batch.attention_mask, vectors, batch.labels, batch.weights)

        with self.below(rows, batch.input_ids, batch.attention_mask):
            loss = self.trainer.step(forward, factor)
        if self.table is not None and vectors is not None and len(rows) and vectors.grad is not None:
            self.table.step(batch.users, vectors.grad)
        return loss


def draw_share(rows: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """That part of `rows`, at random, and at least one row if there are any."""
    count = max(min(1, len(rows)), round(fraction * len(rows)))
    return rows if count == len(rows) else np.sort(np.random.default_rng(seed).choice(rows, count, replace=False))
