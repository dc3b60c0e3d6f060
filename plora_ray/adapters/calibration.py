"""How sure a model may be of its answers: one number, chosen on rows it hasn't learnt from.

    z' = base + scale (z - base)        base: log frequencies of the classes among the rows it has learnt from

A few epochs over few different texts leave logits that are far too large for texts that come afterwards. Temperature scaling (Guo et al.
2017, arXiv 1706.04599) draws them towards equal chances; with classes of unequal frequency that is away from what is known without any
text. With equal frequencies both are the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

SCALES = 2 ** (torch.arange(-120, 61, dtype=torch.float64) / 20)  # 3.5 % apart: the loss is flat around its least
SPREAD = 0.5  # standard deviation of the scale's logarithm before any row is seen: a handful of rows moves it little
HEAD = tuple(f"head.{name}" for name in ("weight", "bias", "H", "M"))  # what the logits are linear in


@dataclass(frozen=True)
class Calibration:
    """scale: positive. base: log frequencies by class."""

    scale: float
    base: tuple[float, ...]

    def of_logits(self, logits: Tensor) -> Tensor:
        """Calibrated logits of logits [..., classes]."""
        base = torch.tensor(self.base, dtype=logits.dtype)
        return base + self.scale * (logits - base)

    def of_shared(self, shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Shared parameters of a model whose logits are the calibrated ones of the model that has `shared`, with every user's vector."""
        found = {name: tensor * self.scale if name in HEAD else tensor for name, tensor in shared.items()}
        bias = found["head.bias"]
        return {**found, "head.bias": bias + (1 - self.scale) * torch.tensor(self.base, dtype=bias.dtype)}


def log_frequencies(counts: Sequence[float]) -> tuple[float, ...]:
    """Of classes with these counts of rows; one more row of each, so that none is impossible."""
    total = sum(counts) + len(counts)
    return tuple(math.log((count + 1) / total) for count in counts)


def scale_losses(logits: Tensor, labels: Tensor, base: Sequence[float]) -> Tensor:
    """Sum [len(SCALES)], float64, of the negative log-likelihood of rows with logits [rows, classes] at each scale. labels: [rows]."""
    logits, labels = logits.double(), labels.long()
    calibrated = (Calibration(scale, tuple(base)).of_logits(logits) for scale in SCALES.tolist())
    return torch.stack([F.cross_entropy(found, labels, reduction="sum") for found in calibrated])


def best_scale(losses: Tensor) -> float:
    """The likeliest of SCALES, given the sums that `scale_losses` found (over all ranks) and that it is probably near 1."""
    surprise = SCALES.log() ** 2 / (2 * SPREAD**2)
    return float(SCALES[int(torch.argmin(losses + surprise))])
