"""What a rank will hold in memory, computed from settings and counts before anything starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from plora_ray.adapters.blocks import find_blocks
from plora_ray.adapters.fit_memory import fit_memory_bytes
from plora_ray.adapters.model import PersonalizedModel
from plora_ray.adapters.pretrained import DTYPES, plm_skeleton
from plora_ray.config import Settings
from plora_ray.data.stats import PartitionCounts
from plora_ray.training.waves import WaveBytes, owned_partitions

MAX_USERS_PER_WAVE = 5000  # with users_per_wave auto: what one interruption may cost stays small
COPIED_USER_BYTES = 1024  # the objects that carry a record from one segment to the next
SEGMENT_COPIES = 4  # of a record while its segment is read, put in order, encoded and sent
ROW_BYTES = 48  # offsets, user, label and split of a row, and its label as it was read
USER_BYTES = 64


@dataclass(frozen=True)
class ModelSize:
    """user_width: numbers of a user's vector. parameter_bytes: of the whole personalised model."""

    user_width: int
    parameter_bytes: int

    @classmethod
    def of(cls, settings: Settings, outputs: int) -> ModelSize:
        """Counted on a model without weights. Raises ModelError if it has no layer to adapt, or no blocks to run again."""
        spec, dtype = settings.adapter_spec(outputs), DTYPES[settings.model.dtype]
        with torch.device("meta"):
            model = PersonalizedModel(plm_skeleton(spec.model, dtype=dtype), spec)
        if settings.training.gradient_checkpointing:
            find_blocks(model.plm)
        return cls(model.user_width, sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()))


def wave_bytes(settings: Settings, outputs: int, width: int) -> WaveBytes:
    """Bytes of a wave beside the model and its activations. outputs: logits a row. width: numbers of a user's vector."""

    def of(users: int, rows: int, copied: int) -> int:
        fit = fit_memory_bytes(
            settings.user_fit().solver, users=users, rows=rows, width=width, outputs=outputs, pass_users=settings.training.batch_rows
        )
        return fit + SEGMENT_COPIES * 4 * width * users + copied_bytes(width, copied)

    return of


def copied_bytes(width: int, users: int) -> int:
    """Bytes that it takes to carry `users` records of `width` numbers from one segment to the next."""
    return (SEGMENT_COPIES * 4 * width + COPIED_USER_BYTES) * users


def rows_bytes(settings: Settings, partitions: Sequence[PartitionCounts], ranks: int) -> int:
    """Most bytes that the rows of one rank's partitions take, with the population stage's vectors and moments of their users."""
    training = settings.training
    table = 12 * settings.adapter.user_dim + 4 if settings.adapter.kind == "plora" and not training.only_users_with_new_data else 0
    sizes = [4 * part.tokens + ROW_BYTES * sum(part.rows.values()) + (USER_BYTES + table) * part.users for part in partitions]
    return max(sum(sizes[partition] for partition in owned_partitions(len(sizes), rank, ranks)) for rank in range(ranks))
