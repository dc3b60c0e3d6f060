"""How far an adapter lies from where the population stands, and keeping it within a bound, whatever it was fitted on.

A flood of poisoned examples then hurts its author only so much, and nobody else: an adapter is read by its own user alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plora_ray.inference.loading import LoadedGeneration


def distances(loaded: LoadedGeneration, vectors: Tensor) -> Tensor:
    """[users], float64, of vectors [users, user_width].

    Kind plora: sqrt((p - mu)^T C^-1 (p - mu) / d) under the generation's prior N(mu, C), so that users as the prior expects them lie
    around 1. Kind lora: |v - v0| / |v0|, v0 the population's matrices.
    """
    centre = _centre(loaded)
    moved = vectors.double() - centre
    if loaded.prior is not None:
        return ((moved @ loaded.prior.precision) * moved).sum(1).div(len(centre)).sqrt()
    return moved.norm(dim=1) / centre.norm()


def within(loaded: LoadedGeneration, vectors: Tensor, starts: Tensor, bound: float) -> Tensor:
    """`vectors` [users, user_width], those beyond `bound` scaled back onto it, towards the population.

    starts: [users, user_width]; one that training itself put beyond the bound may be kept as far out, and not be left further out.
    """
    allowed = distances(loaded, starts).clamp(min=bound)
    scale = (allowed / distances(loaded, vectors)).clamp(max=1.0).nan_to_num(1.0)
    if bool((scale == 1).all()):
        return vectors
    centre = _centre(loaded)
    return torch.where(scale.unsqueeze(1) == 1, vectors, (centre + (vectors.double() - centre) * scale.unsqueeze(1)).to(vectors.dtype))


def _centre(loaded: LoadedGeneration) -> Tensor:
    """[user_width], float64: the prior's mean, or the population's matrices."""
    return loaded.prior.mean if loaded.prior is not None else loaded.model.population_vector().cpu().double()
