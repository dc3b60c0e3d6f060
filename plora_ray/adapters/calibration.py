"""How sure a model may be of its answers: one number that all its logits are multiplied by, chosen on rows it hasn't learnt from.

Temperature scaling (Guo et al. 2017, arXiv 1706.04599). A few epochs over few different texts leave logits that are far too large for
texts that come afterwards; the order of the classes stays as it is, and so does every accuracy.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

SCALES = 2 ** (torch.arange(-120, 61, dtype=torch.float64) / 20)  # 3.5 % apart: the loss is flat around its least
SPREAD = 0.5  # standard deviation of the scale's logarithm before any row is seen: a handful of rows moves it little
HEAD = tuple(f"head.{name}" for name in ("weight", "bias", "H", "M"))  # what the logits are linear in


def scale_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum [len(SCALES)], float64, of the rows' negative log-likelihood with logits [rows, classes] times each of SCALES. labels: [rows]."""
    logits, labels = logits.double(), labels.long()
    return torch.stack([F.cross_entropy(scale * logits, labels, reduction="sum") for scale in SCALES])


def best_scale(losses: Tensor) -> float:
    """The likeliest of SCALES, given the sums that `scale_losses` found (over all ranks) and that it is probably near 1."""
    surprise = SCALES.log() ** 2 / (2 * SPREAD**2)
    return float(SCALES[int(torch.argmin(losses + surprise))])


def scaled(shared: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Shared parameters whose model's logits are `scale` times as large, with every user's vector."""
    return {name: tensor * scale if name in HEAD else tensor for name, tensor in shared.items()}
