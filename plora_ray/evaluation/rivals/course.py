"""How a rival is trained: passes, batches, AdamW and the step size. Knows parameters and lengths of rows; no model, no text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from plora_ray.adapters.schedule import learning_rate_factor
from plora_ray.config import TrainingSettings
from plora_ray.data.batches import token_budget_batches
from plora_ray.errors import ModelError
from plora_ray.evaluation.metrics import Ints
from plora_ray.inference.engine import pad


@dataclass(frozen=True)
class Course:
    """A training. clipping: norm of the gradient. decays: warm up and decay as the population stage does; else a constant rate."""

    epochs: int
    learning_rate: float
    weight_decay: float
    warmup_fraction: float
    clipping: float
    batch_rows: int
    batch_tokens: int
    seed: int
    decays: bool = True

    @classmethod
    def like(cls, training: TrainingSettings) -> Course:
        """That of the population stage."""
        return cls(
            training.epochs, training.learning_rate, training.weight_decay, training.warmup_fraction, training.gradient_clipping,
            training.batch_rows, training.batch_tokens, training.seed,
        )  # fmt: skip

    def train(
        self,
        parameters: Iterable[nn.Parameter],
        lengths: Sequence[int],
        loss_of: Callable[[Ints], Tensor],
        advance: Callable[[int], None],
    ) -> None:
        """Minimise `loss_of(places of a batch)` over rows of `lengths` tokens. Raises ModelError if the loss is no number any more."""
        trained = list(parameters)
        optimizer = torch.optim.AdamW(trained, lr=self.learning_rate, weight_decay=self.weight_decay)
        budget = max([self.batch_tokens, *lengths])
        torch.manual_seed(self.seed)
        batches = [
            batch
            for epoch in range(self.epochs)
            for batch in token_budget_batches(np.array(lengths), budget, self.batch_rows, shuffle_seed=self.seed * 1009 + epoch)
        ]
        for step, batch in enumerate(batches):
            factor = learning_rate_factor(step, len(batches), self.warmup_fraction) if self.decays else 1.0
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * factor
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(batch)
            if not math.isfinite(loss.item()):
                raise ModelError(f"a baseline's training loss became {loss.item()} at step {step}: lower training.learning_rate")
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(trained, self.clipping)
            optimizer.step()
            advance(len(batch))


@torch.inference_mode()
def answers(
    forward: Callable[[Tensor, Tensor, Ints], Tensor], ids: Sequence[Sequence[int]], *, pad_id: int, batch_tokens: int, batch_rows: int
) -> NDArray[np.float32]:
    """Logits [rows, outputs] of `forward(input_ids, attention_mask, places)`, in batches of rows of like length."""
    lengths = [len(row) for row in ids]
    parts: dict[int, NDArray[np.float32]] = {}
    for places in token_budget_batches(np.array(lengths), max([batch_tokens, *lengths]), batch_rows, shuffle_seed=None):
        logits = forward(*pad([ids[place] for place in places], pad_id), places).float().cpu().numpy()
        parts |= dict(zip(places.tolist(), logits, strict=True))
    return np.stack([parts[place] for place in range(len(ids))])
