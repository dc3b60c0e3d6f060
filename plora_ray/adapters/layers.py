"""The two forms of a PLoRA layer: one to train, one to serve. Knows tensors; nothing of models, users' names or storage."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plora_ray.adapters.context import UserContext


def _rowwise(term: Tensor, like: Tensor, context: UserContext) -> Tensor:
    """Spread a term of each user [users, k] over the rows and token dimensions of `like` [batch, ..., *]."""
    context.check_rows(like)
    rows = term.repeat_interleave(context.rows // len(term), 0)
    return rows.view(context.rows, *([1] * (like.dim() - 2)), term.shape[1])


class PLoRALinear(nn.Module):
    """Training form of a personalised low-rank layer (Zhang et al., AAAI 2024, arXiv 2403.06208).

        y = W x + b + s * B (A drop(x) + q + P p_u)        s = alpha / rank

    W [out, in], b [out] are frozen. A [r, in], B [out, r] (zero at start), P [r, d] and q [r] (zero at start) are shared by all users;
    p_u [d] is the user's own and comes from the context. x: [batch, ..., in]; y: [batch, ..., out].

    q isn't the paper's: it takes up what users have in common, so that p_u = 0 is the average user (see `centring`).
    """

    shared = ("A", "B", "P", "q")

    def __init__(self, base: nn.Linear, *, rank: int, alpha: float, user_dim: int, dropout: float, context: UserContext, name: str) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scaling = alpha / rank
        self.context = context
        self.name = name
        device = base.weight.device
        self.A = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        self.P = nn.Parameter(torch.empty(rank, user_dim, device=device))
        self.q = nn.Parameter(torch.zeros(rank, device=device))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        nn.init.kaiming_uniform_(self.P, a=math.sqrt(5))
        self.dropout = nn.Dropout(dropout)

    @property
    def weight(self) -> Tensor:
        """The frozen W: some models look at a layer's weight for its dtype."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.A.dtype
        low = F.linear(self.dropout(x).to(dtype), self.A, self.q)
        vectors = self.context.vectors
        if vectors is not None:
            user = F.linear(vectors.to(dtype), self.P)
            if self.context.record_effects:
                self.context.effects[self.name] = F.linear(user, self.B) * self.scaling
            low = low + _rowwise(user, low, self.context)
        return self.base(x) + F.linear(low * self.scaling, self.B).to(x.dtype)  # scaled where it is narrow

    def serving_form(self) -> FoldedLinear:
        """The same layer with everything shared folded into one weight."""
        return FoldedLinear(self)


class FoldedLinear(nn.Module):
    """Serving form: everything shared is in W', a user is one small vector added to every token.

        y = W' x + b' + B c_u        W' = W + s B A        b' = b + s B q        c_u = s P p_u

    The two products of the user term are one matrix U = s B P [out, d], so a row costs d multiply-adds an output.
    """

    def __init__(self, trained: PLoRALinear) -> None:
        super().__init__()
        base = trained.base
        with torch.no_grad():
            delta = (trained.B.float() @ trained.A.float()) * trained.scaling
            weight = (base.weight.float() + delta).to(base.weight.dtype)
            bias = (trained.B.float() @ trained.q.float()) * trained.scaling
            if base.bias is not None:
                bias = bias + base.bias.float()
            user_map = (trained.B.float() @ trained.P.float()) * trained.scaling
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias.to(base.weight.dtype), requires_grad=False)
        self.register_buffer("user_map", user_map.to(base.weight.dtype))
        self.user_map: Tensor
        self.context = trained.context

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        vectors = self.context.vectors
        if vectors is not None:
            y = y + _rowwise(F.linear(vectors.to(self.user_map.dtype), self.user_map), y, self.context)
        return y
