"""The memory that a fit is said to take, against what torch really allocates for it."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from plora_ray.adapters.adam import AdamSteps, UserRows, fit_adam
from plora_ray.adapters.fit import Linearisation, UserPrior, solve_users
from plora_ray.adapters.fit_memory import fit_memory_bytes
from plora_ray.adapters.packing import Pack

OUTPUTS = 3


class PeakBytes(TorchDispatchMode):
    """Most bytes of tensors made while it is on that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, list[int]] = {}  # storage -> [tensors on it, bytes]
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes():
                place = tensor.untyped_storage().data_ptr()
                if place not in self.alive:
                    self.alive[place] = [0, tensor.untyped_storage().nbytes()]
                    self.now += self.alive[place][1]
                self.alive[place][0] += 1
                weakref.finalize(tensor, self._freed, place)
        self.peak = max(self.peak, self.now)
        return result

    def _freed(self, place: int) -> None:
        entry = self.alive[place]
        entry[0] -= 1
        if not entry[0]:
            self.now -= self.alive.pop(place)[1]


@pytest.mark.parametrize(("users", "rows_each", "width"), [(300, 3, 32), (40, 100, 32), (400, 10, 64)])
def test_newton_takes_no_more_than_is_said_and_not_far_less(users: int, rows_each: int, width: int) -> None:
    rows = users * rows_each
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(OUTPUTS, (rows,), generator=generator)
    prior = UserPrior(torch.zeros(width, dtype=torch.float64), torch.eye(width, dtype=torch.float64))
    with PeakBytes() as memory:
        jacobian = torch.randn(rows, OUTPUTS - 1, width, generator=generator)
        linear = Linearisation(torch.zeros(width), torch.randn(rows, OUTPUTS, generator=generator), jacobian)
        solve_users(linear, torch.arange(rows), labels, torch.arange(users).repeat_interleave(rows_each), users, prior, "classification")
    said = fit_memory_bytes("newton", users=users, rows=rows, width=width, outputs=OUTPUTS, pass_users=32)
    assert 0.3 * said < memory.peak <= said


class Linear:
    """A model without activations to speak of: logits are the first numbers of a user's vector."""

    max_tokens, max_rows = 1000, 20

    def logits(self, rows: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        return vectors[:, :OUTPUTS].repeat_interleave(len(rows) // len(vectors), 0)

    def in_step(self, packs: list[Pack]) -> list[Pack]:
        return packs


def test_adam_takes_no_more_than_is_said_and_not_far_less() -> None:
    users, width = 60, 20_000
    own = torch.arange(users).repeat_interleave(2)
    labels, lengths = torch.zeros(2 * users).long(), torch.ones(2 * users).long()
    rows = UserRows(torch.arange(2 * users), own, labels, lengths)
    with PeakBytes() as memory:
        fit_adam(Linear(), rows, rows, torch.zeros(width), 1.0, [0] * users, AdamSteps(epochs=2), "classification")
    said = fit_memory_bytes("adam", users=users, rows=2 * users, width=width, outputs=OUTPUTS, pass_users=Linear.max_rows)
    assert 0.3 * said < memory.peak <= said
