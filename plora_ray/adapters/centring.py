"""Moving what users have in common out of their vectors, so that nobody's vector, zero, is the average user's.

Vectors are learnt with everything else, and nothing keeps their mean at zero: a part of what holds for everybody comes to lie in it,
where users without a vector miss it. With q' = q + P mu, and the head's own terms alike, every layer gives for p_u - mu exactly what it
gave for p_u.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from plora_ray.adapters.head import head_at


@torch.no_grad()
def centred(shared: Mapping[str, Tensor], mean: Tensor) -> dict[str, Tensor]:
    """Shared parameters of kind plora, in which vectors are counted from `mean` [user_dim]: p_u there is p_u - mean here."""
    mean, moved = mean.double(), {name: tensor.double() for name, tensor in shared.items()}
    for name in shared:
        layer, _, part = name.rpartition(".")
        if part == "P":
            moved[f"{layer}.q"] = moved[f"{layer}.q"] + moved[name] @ mean
    head = {name.removeprefix("head."): tensor for name, tensor in shared.items() if name.startswith("head.")}
    moved["head.weight"], moved["head.bias"] = head_at(head, mean)
    return {name: tensor.to(shared[name].dtype) for name, tensor in moved.items()}
