"""The user stage: with everything shared frozen, every user's own adapter, wave by wave. No gradient leaves the rank.

A finished wave is a segment in the store and is never trained again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Set
from dataclasses import dataclass

import numpy as np
import torch

from plora_ray.adapters.model import Task
from plora_ray.training.fitters import WaveFitter
from plora_ray.training.heap import give_back_freed_memory
from plora_ray.training.passes import FrozenPasses
from plora_ray.training.rank_rows import RankRows
from plora_ray.training.run_state import RunState, WaveOutcome
from plora_ray.training.wave_users import SegmentUsers, WaveUsers
from plora_ray.training.waves import Wave

ErasedKeys = Callable[[], Set[bytes]]


@dataclass(frozen=True)
class WaveDone:
    """A finished wave, how many users it holds and how many training rows they have."""

    wave: int
    users: int
    rows: int


@dataclass
class UserStage:
    """One rank's part: fits the waves of its partitions that `finished` doesn't name; `waves` writes each as a segment.

    erased_keys: asks the store for the keys of all users erased so far.
    """

    fitter: WaveFitter
    passes: FrozenPasses
    rows: RankRows
    task: Task
    waves: WaveUsers
    run: RunState
    on_wave: Callable[[WaveDone], None]
    erased_keys: ErasedKeys

    def fit_waves(self, waves: list[Wave], finished: Collection[int], in_step: Callable[[list[Wave | None]], list[Wave | None]]) -> None:
        """Fit what is left. in_step: pads the list of waves with None until all ranks have as many (when sharded)."""
        left: list[Wave | None] = [wave for wave in waves if wave.index not in finished]
        for wave in in_step(left):
            self._fit(wave)
            give_back_freed_memory()

    def _fit(self, wave: Wave | None) -> None:
        erased = self.erased_keys()
        self.rows.mark_erased(erased)  # a job runs for hours; whoever left meanwhile is left out from here on
        users = self._users(wave)
        train, held_out = self.rows.of_split("train", users), self.rows.of_split("test", users)
        fitted = self.fitter.fit(users)
        local = np.searchsorted(users, self.rows.row_users[train])
        tested = np.searchsorted(users, self.rows.row_users[held_out])
        population = self.passes.population_logits(held_out)
        personal = self.passes.user_logits(held_out, fitted.vectors, torch.from_numpy(tested))
        if wave is None:
            return
        copied = self.waves.unchanged(wave, erased)
        examples = np.bincount(local, minlength=len(users)).astype(np.int32)
        outcome = WaveOutcome(
            examples=examples,
            row_users=tested,
            labels=self.rows.labels[held_out].numpy(),
            population=population.numpy(),
            personal=personal.numpy(),
            label_counts=self._label_counts(train, local, len(users)),
            remaining=fitted.remaining.numpy(),
            guarded=fitted.guarded.numpy(),
            copied=copied.examples,
        )
        self.waves.write(
            wave, SegmentUsers(self.rows.keys[users], fitted.vectors.numpy(), examples), copied,
            announce=lambda segment: self.run.save_wave(wave.index, outcome, segment),  # a wave with a segment is finished for good
        )  # fmt: skip
        self.on_wave(WaveDone(wave.index, len(users) + len(copied.keys), len(train)))

    def _users(self, wave: Wave | None) -> np.ndarray:
        if wave is None:
            return np.empty(0, np.int64)
        return self.rows.find(wave.partition, self.waves.to_fit(wave))

    def _label_counts(self, train: np.ndarray, local: np.ndarray, users: int) -> np.ndarray:
        """How often each user gave each class (or, for a regression, the sum of the labels): [users, outputs]."""
        labels = self.rows.labels[train].numpy()
        if self.task == "regression":
            return np.bincount(local, weights=labels, minlength=users).astype(np.float32)[:, None]
        outputs = int(self.passes.outputs)
        flat = np.bincount(local * outputs + labels, minlength=users * outputs)
        return flat.reshape(users, outputs).astype(np.float32)
