"""The population stage: what all users share (A, B, P and the head) and a first vector for every user this rank owns.

Mixed-user batches; shared parameters go through the DeepSpeed engine, user vectors through the rank's own table.
Checkpointed at the end of every epoch, for any number of ranks afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from plora_ray.config import TrainingSettings
from plora_ray.data.batches import token_budget_batches
from plora_ray.training.checkpoints import PopulationCheckpoints
from plora_ray.training.engine import ShardedTrainer
from plora_ray.training.rank_rows import RankRows
from plora_ray.training.user_table import UserTable

StepReport = Callable[[int, int, float], None]  # steps done, steps in all, mean loss since the last report

REPORT_EVERY_STEPS = 10


@dataclass
class PopulationStage:
    """One rank's part of the stage. `rank` and `seed` only decide the order in which rows are met."""

    trainer: ShardedTrainer
    rows: RankRows
    table: UserTable
    settings: TrainingSettings
    rank: int
    checkpoints: PopulationCheckpoints
    on_steps: StepReport

    def run(self) -> None:
        """Train from the last checkpoint, or from the start, to the last epoch. All ranks must call."""
        epoch, step = self.checkpoints.restore(self.trainer, self.rows, self.table)
        while epoch < self.settings.epochs:
            batches = self._batches(epoch)
            step = self._epoch(batches, step)
            epoch += 1
            self.checkpoints.save(epoch, step, self.trainer, self.rows, self.table)

    def _batches(self, epoch: int) -> list[np.ndarray]:
        rows = self.rows.of_split("train")
        seed = (self.settings.seed * 1009 + epoch) * 65537 + self.rank
        groups = token_budget_batches(
            self.rows.lengths[rows], max_tokens=self.settings.batch_tokens, max_rows=self.settings.batch_rows, shuffle_seed=seed
        )
        return [rows[group] for group in groups]

    def _epoch(self, batches: list[np.ndarray], step: int) -> int:
        self.trainer.engine.train()
        steps_in_all = -1
        losses: list[Tensor] = []
        for rows, real, passes in self.trainer.lockstep(batches, np.empty(0, np.int64), collective=True):
            if steps_in_all < 0:
                steps_in_all = max(step + passes, passes * self.settings.epochs)
            loss = self._step(rows, self._learning_rate_factor(step, steps_in_all))
            step += 1
            if real:
                losses.append(loss)
            if step % REPORT_EVERY_STEPS == 0 and losses:
                self._report(step, steps_in_all, losses)
        if losses:
            self._report(step, steps_in_all, losses)
        return step

    def _report(self, step: int, steps_in_all: int, losses: list[Tensor]) -> None:
        mean = torch.stack(losses).mean().item()
        losses.clear()
        if not math.isfinite(mean):
            raise FloatingPointError(
                f"the training loss became {mean} at step {step}: lower training.learning_rate or use model.dtype=fp32"
            )
        self.on_steps(step, steps_in_all, mean)

    def _learning_rate_factor(self, step: int, steps_in_all: int) -> float:
        """Linear warm-up, then linear decay to a tenth."""
        warmup = max(1, round(self.settings.warmup_fraction * steps_in_all))
        if step < warmup:
            return (step + 1) / warmup
        return 1.0 - 0.9 * min(1.0, (step - warmup) / max(1, steps_in_all - warmup))

    def _step(self, rows: np.ndarray, factor: float) -> Tensor:
        batch = self.rows.batch(rows, self.trainer.device)
        vectors = self.table.gather(batch.users, self.trainer.device)

        def forward(engine: nn.Module) -> Tensor:
            return engine(batch.input_ids, batch.attention_mask, vectors, batch.labels, batch.weights)

        loss = self.trainer.step(forward, factor)
        if len(rows) and vectors.grad is not None:
            self.table.step(batch.users, vectors.grad)
        return loss
