"""The users of the batch that a model is computing, as its adapted layers see them.

All layers of a model share one `UserContext`, because Hugging Face models offer no way to pass one more argument down to
a linear layer. Knows tensors; nothing of models or of users' names.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from plora_ray.errors import ModelError


@dataclass
class UserContext:
    """What the layers need to know of the current batch.

    vectors: [users, width] one flat record a user, or None for the population. The rows of a user are adjacent, and all
        users have equally many: row i belongs to user i // (rows / users).
    rows: rows of the batch.
    effects: per layer, its user term s B P p_u [users, out] of the last forward pass; filled only while `record_effects`.
    terms: per folded layer, its user term s B P p_u [users, out].
    matrices: per layer of the kind `lora`, the users' A [users, rank, in] and B [users, out, rank], views of `vectors`.
    shapes: per layer of the kind `lora`, in model order, (rank, in, out): how a record divides into matrices.
    """

    vectors: Tensor | None = None
    rows: int = 0
    record_effects: bool = False
    effects: dict[str, Tensor] = field(default_factory=dict)
    terms: dict[str, Tensor] = field(default_factory=dict)
    matrices: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    shapes: dict[str, tuple[int, int, int]] = field(default_factory=dict)

    def enter(self, vectors: Tensor | None, rows: int) -> None:
        """Begin a batch of `rows` rows. Raises ModelError if they can't be divided equally among the users."""
        if vectors is not None and (not len(vectors) or rows % len(vectors)):
            raise ModelError(f"{rows} rows can't be divided among {len(vectors)} users: every user needs equally many adjacent rows")
        self.vectors, self.rows = vectors, rows
        self.matrices = {} if vectors is None or not self.shapes else cut_matrices(vectors, self.shapes)

    def leave(self) -> None:
        """Forget the batch's users."""
        self.vectors, self.terms, self.matrices = None, {}, {}

    def check_rows(self, x: Tensor) -> None:
        """Raise ModelError if a layer's input [batch, ..., in] doesn't have one row a text."""
        if x.shape[0] != self.rows:
            raise ModelError(
                f"a layer sees {x.shape[0]} rows for a batch of {self.rows} texts: "
                "layers that flatten rows and tokens (mixture-of-experts, unpadded attention) can't carry user terms; name other targets"
            )


def cut_matrices(records: Tensor, shapes: dict[str, tuple[int, int, int]]) -> dict[str, tuple[Tensor, Tensor]]:
    """A [users, rank, in] and B [users, out, rank] of every layer, as views of flat records [users, width].

    One split over all layers, whose backward pass is one concatenation.
    """
    sizes = [size for rank, inner, outer in shapes.values() for size in (rank * inner, outer * rank)]
    pieces = iter(torch.split(records, sizes, dim=1))
    return {name: (next(pieces).view(-1, rank, inner), next(pieces).view(-1, outer, rank)) for name, (rank, inner, outer) in shapes.items()}
