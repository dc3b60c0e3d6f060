"""Checkpoints of the population stage in the run's folder of the store: written whole, readable by any number of ranks.

Shared parameters and their Adam moments are gathered into one object; each partition's user vectors are another, so a
rank restores exactly the partitions it owns now. An epoch counts only once its marker, written last, is there.
"""

from __future__ import annotations

import json

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

from plora_ray.store.objects import ObjectStore
from plora_ray.training.engine import ShardedTrainer
from plora_ray.training.rank_rows import RankRows
from plora_ray.training.user_table import UserTable


class PopulationCheckpoints:
    """objects: the store. folder: the run's folder in it. rank: this process's rank; rank 0 writes what is shared."""

    def __init__(self, objects: ObjectStore, folder: str, rank: int) -> None:
        self._objects = objects
        self._folder = f"{folder}/population"
        self._rank = rank

    def latest(self) -> tuple[int, int] | None:
        """(epochs done, steps done) of the newest whole checkpoint, or None."""
        markers = [info.path for info in self._objects.list(self._folder) if info.path.endswith("/done.json")]
        if not markers:
            return None
        done = json.loads(self._objects.read(max(markers)))
        return done["epoch"], done["step"]

    def save(self, epoch: int, step: int, trainer: ShardedTrainer, rows: RankRows, table: UserTable | None) -> None:
        """Write the state after `epoch` epochs and drop the one before. All ranks must call."""
        shared = {**trainer.gathered(), **trainer.moments()}
        folder = self._epoch_folder(epoch)
        if table is not None:
            for partition, span in rows.partition_users.items():
                state = {name: values[span].contiguous() for name, values in table.state().items()}
                self._objects.write(f"{folder}/users-{partition:05d}.safetensors", save(state))
        if self._rank == 0:
            self._objects.write(f"{folder}/shared.safetensors", save(shared))
        dist.barrier()
        if self._rank == 0:
            self._objects.write(f"{folder}/done.json", json.dumps({"epoch": epoch, "step": step}).encode())
            for info in self._objects.list(self._folder):
                if not info.path.startswith(f"{folder}/"):
                    self._objects.delete(info.path)
        dist.barrier()

    def restore(self, trainer: ShardedTrainer, rows: RankRows, table: UserTable | None) -> tuple[int, int]:
        """Load the newest checkpoint into trainer and table; (epochs done, steps done), (0, 0) when there is none."""
        found: list[tuple[int, int] | None] = [self.latest() if self._rank == 0 else None]
        dist.broadcast_object_list(found, src=0)  # ranks must agree even if a marker appears in between
        if found[0] is None:
            return 0, 0
        epoch, step = found[0]
        folder = self._epoch_folder(epoch)
        shared: dict[str, Tensor] = load(self._objects.read(f"{folder}/shared.safetensors"))
        trainer.load({name: shared[name] for name in trainer.trained})
        trainer.load_moments(shared, step)
        if table is not None:
            for partition, span in rows.partition_users.items():
                table.load_state(span.start, load(self._objects.read(f"{folder}/users-{partition:05d}.safetensors")))
        torch.manual_seed(epoch * 65_537 + self._rank + 1)
        return epoch, step

    def _epoch_folder(self, epoch: int) -> str:
        return f"{self._folder}/epoch-{epoch:05d}"
