"""The user vectors one rank owns in the population stage, with an Adam that moves only the rows a batch met.

A dense optimiser would keep moving absent users by their stale momentum at every step. Here each row has its own moments
and step count, so a user's updates depend on that user's own gradients alone. Never synchronised between ranks.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

BETAS = (0.9, 0.999)
EPSILON = 1e-8


class UserTable:
    """Vectors [users, d] float32, zero at start, and their Adam moments.

    learning_rate: step size per row, constant. weight_decay: decoupled, per step that meets the row (AdamW).
    """

    def __init__(self, users: int, dim: int, *, learning_rate: float, weight_decay: float = 0.0) -> None:
        self.vectors = torch.zeros(users, dim)
        self.first = torch.zeros(users, dim)
        self.second = torch.zeros(users, dim)
        self.steps = torch.zeros(users, dtype=torch.int32)
        self.learning_rate, self.weight_decay = learning_rate, weight_decay

    def gather(self, users: Tensor, device: torch.device | None = None) -> Tensor:
        """Leaf tensor [batch, d] of the users' vectors, requiring gradients: the input of a forward pass.

        A rank without users, which only keeps others in step, gets zeros.
        """
        vectors = self.vectors[users] if len(self.vectors) else torch.zeros(len(users), self.vectors.shape[1])
        return vectors.to(device or self.vectors.device).requires_grad_(True)

    def step(self, users: Tensor, gradient: Tensor) -> None:
        """One Adam step (Kingma & Ba 2015) of the rows that `users` [batch] names. gradient: [batch, d] of the gathered leaf."""
        rows, summed = _summed_by_user(users, gradient.detach().float().cpu())
        beta1, beta2 = BETAS
        self.steps[rows] += 1
        steps = self.steps[rows].unsqueeze(1).float()
        first = self.first[rows].mul_(beta1).add_(summed, alpha=1 - beta1)
        second = self.second[rows].mul_(beta2).addcmul_(summed, summed, value=1 - beta2)
        self.first[rows], self.second[rows] = first, second
        denominator = (second / (1 - beta2**steps)).sqrt_().add_(EPSILON)
        kept = (1 - self.learning_rate * self.weight_decay) * self.vectors[rows]
        self.vectors[rows] = kept - self.learning_rate * (first / (1 - beta1**steps)) / denominator

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed job needs, by name."""
        return {"vectors": self.vectors, "first": self.first, "second": self.second, "steps": self.steps}

    def load_state(self, start: int, state: dict[str, Tensor]) -> None:
        """Put a saved slice of rows back at row `start`."""
        for name, values in self.state().items():
            values[start : start + len(state[name])] = state[name]


def _summed_by_user(users: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The different users [k], ascending, and the sum [k, d] of each one's rows of `gradient` [batch, d].

    By NumPy, in this thread: torch's sum by index wakes all of its threads, which was a fifth of a step's time beside a GPU.
    """
    order = np.argsort(users.numpy(), kind="stable")
    rows, starts = np.unique(users.numpy()[order], return_index=True)
    return torch.from_numpy(rows), torch.from_numpy(np.add.reduceat(gradient.numpy()[order], starts, axis=0))
