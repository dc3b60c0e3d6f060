"""The task head, which may hear the user, too. Knows tensors; nothing of models, users' names or storage."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

UserTerms = Literal["none", "bias", "taste"]


class TaskHead(nn.Linear):
    """Logits of pooled texts h, with up to two terms of the user's vector p_u, which are linear in it as those of the layers are:

        none     z = W h + b
        bias     z = W h + b + H p_u                               the user's leaning, whatever the text
        taste    z = W h + b + H p_u + M ((D h) * (Q p_u))         and how much each of r directions of a text weighs for the user

    W [outputs, hidden] and b [outputs] as in every linear head; H [outputs, d], D [r, hidden], Q [r, d], M [outputs, r]: shared by all
    users. The product is elementwise: matrix factorisation (Koren et al. 2009) with what the model makes of a text in place of an item.
    p_u = 0 takes both terms away. For one user it all is one linear head again, `of_user`. h: [batch, hidden]; z: [batch, outputs].

    H begins as `leanings`: the last numbers of a vector are its user's leanings, and the others say nothing here.
    """

    def __init__(self, hidden: int, outputs: int, *, terms: UserTerms = "none", rank: int = 1, user_dim: int = 1) -> None:
        super().__init__(hidden, outputs)
        self.terms = terms
        if terms != "none":
            self.H = nn.Parameter(leanings(outputs, user_dim))
        if terms == "taste":
            self.D, self.Q, self.M = _uniform(rank, hidden), _uniform(rank, user_dim), _uniform(outputs, rank)

    def forward(self, input: Tensor, vectors: Tensor | None = None) -> Tensor:
        """vectors: [users, d], each for batch / users adjacent rows, or None for the population."""
        logits = super().forward(input)
        if vectors is None or self.terms == "none":
            return logits
        rows = len(input) // len(vectors)
        vectors = vectors.to(self.weight.dtype)
        logits = logits + F.linear(vectors, self.H).repeat_interleave(rows, 0)
        if self.terms == "taste":
            weights = F.linear(vectors, self.Q).repeat_interleave(rows, 0)
            logits = logits + F.linear(F.linear(input, self.D) * weights, self.M)
        return logits

    @torch.no_grad()
    def of_user(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Weight [outputs, hidden] and bias [outputs], float64, of the linear head that the user with `vector` [d] has."""
        return head_at({name: parameter.cpu() for name, parameter in self.named_parameters()}, vector.cpu())


def head_at(parameters: Mapping[str, Tensor], vector: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [outputs, hidden] and bias [outputs], float64, that a TaskHead with these parameters, by name, has at `vector` [d]."""
    own, vector = {name: parameter.double() for name, parameter in parameters.items()}, vector.double()
    weight, bias = own["weight"], own["bias"]
    if "H" in own:
        bias = bias + own["H"] @ vector
    if "M" in own:
        weight = weight + (own["M"] * (own["Q"] @ vector)) @ own["D"]
    return weight, bias


def leanings_of(outputs: int, user_dim: int) -> int:
    """How many of a vector's last numbers are leanings: as many as outputs can differ in, and half of the vector at most."""
    return min(max(outputs - 1, 1), user_dim // 2)


def leanings(outputs: int, user_dim: int) -> Tensor:
    """[outputs, user_dim]: an H by which the last numbers of a vector are how far its user leans towards each class, in logits.

    Their columns are orthonormal and, since softmax sees only differences, sum to zero; for a regression it is the one output.
    """
    count = leanings_of(outputs, user_dim)
    directions = torch.ones(1, count)
    if outputs > 1:
        directions = torch.randn(outputs, count)
        directions = torch.linalg.qr(directions - directions.mean(0)).Q
    return torch.cat([torch.zeros(outputs, user_dim - count), directions], dim=1)


def _uniform(rows: int, columns: int) -> nn.Parameter:
    """As torch begins a linear layer: there is something to learn as soon as a user's vector isn't zero any more."""
    parameter = nn.Parameter(torch.empty(rows, columns))
    nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
    return parameter
