"""The two forms of a PLoRA layer: one to train, one to serve. Knows tensors; nothing of models, users' names or storage."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plora_ray.adapters.context import UserContext


def _add_to_rows(y: Tensor, term: Tensor, context: UserContext) -> Tensor:
    """`y` [batch, ..., k], a product nobody else has, with each user's term [users, k] added in place to all tokens of the user's rows."""
    context.check_rows(y)
    y.view(len(term), -1, term.shape[1]).add_(term.unsqueeze(1))
    return y


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
            low = _add_to_rows(low, user, self.context)
        return self.base(x) + F.linear(low * self.scaling, self.B).to(x.dtype)  # scaled where it is narrow

    @torch.no_grad()
    def user_map(self) -> Tensor:
        """U = s B P [out, d], in the frozen weight's dtype: the two products of the user's term as one matrix."""
        return ((self.B.float() @ self.P.float()) * self.scaling).to(self.base.weight.dtype)

    def serving_form(self) -> FoldedLinear:
        """The same layer with everything shared folded into one weight."""
        return FoldedLinear(self)


class FoldedLinear(nn.Module):
    """Serving form: everything shared is in W', a user is one small vector added to every token.

        y = W' x + b' + B c_u        W' = W + s B A        b' = b + s B q        c_u = s P p_u

    B c_u [users, out] comes from the context: the model finds it for all its layers at once (`PLoRALinear.user_map`).
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
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias.to(base.weight.dtype), requires_grad=False)
        self.context, self.name = trained.context, trained.name

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        term = self.context.terms.get(self.name)
        return y if term is None else _add_to_rows(y, term, self.context)
