"""The layer of the kind `lora`: every user has low-rank matrices of its own. Knows tensors; nothing of models or storage."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plora_ray.adapters.context import UserContext


class PrivateLoRALinear(nn.Module):
    """A low-rank layer whose matrices are the user's (Hu et al., ICLR 2022, arXiv 2106.09685, with one pair a user).

        y = W x + b + s * B_u A_u drop(x)        s = alpha / rank

    W [out, in], b [out] are frozen. A_u [r, in], B_u [out, r] come from the context; without users they are the
    population's, the parameters A and B (zero at start). x: [batch, ..., in]; y: [batch, ..., out].

    All users of a batch are one batched product over their blocks of adjacent rows, so a user's matrices are gathered once
    a batch, however many of its rows are in it. The form serves as it stands.
    """

    shared = ("A", "B")

    def __init__(self, base: nn.Linear, *, rank: int, alpha: float, dropout: float, context: UserContext, name: str) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scaling = alpha / rank
        self.context = context
        self.name = name
        device = base.weight.device
        self.A = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.dropout = nn.Dropout(dropout)

    @property
    def weight(self) -> Tensor:
        """The frozen W: some models look at a layer's weight for its dtype."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        if self.context.vectors is None:
            low = F.linear(self.dropout(x), self.A.to(y.dtype))
            return y + F.linear(low, self.B.to(y.dtype)) * self.scaling
        self.context.check_rows(x)
        a, b = (matrix.to(y.dtype) for matrix in self.context.matrices[self.name])
        low = torch.bmm(self.dropout(x).reshape(len(a), -1, x.shape[-1]), a.mT)
        add = torch.baddbmm if torch.is_grad_enabled() else torch.Tensor.baddbmm_  # without gradients nobody needs the y of before
        return add(y.reshape(len(a), -1, y.shape[-1]), low, b.mT, alpha=self.scaling).view(y.shape)

    def serving_form(self) -> PrivateLoRALinear:
        """This layer: users' matrices can't be folded into a weight that other users share."""
        return self
