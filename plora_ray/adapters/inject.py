"""Putting PLoRA layers into a Hugging Face model without editing its code, and folding them for serving."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from plora_ray.adapters.layers import FoldedLinear, PLoRALinear, UserContext
from plora_ray.errors import ModelError


def matches(name: str, targets: Sequence[str]) -> bool:
    """Whether module `name` is, or ends at a dot boundary with, one of `targets` (PEFT's rule)."""
    return any(name == target or name.endswith("." + target) for target in targets)


def find_targets(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """Names of the linear layers that `targets` select, in model order.

    Raises ModelError when a target selects nothing or something that isn't a torch Linear.
    """
    modules = dict(model.named_modules())
    linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    for target in targets:
        if any(matches(name, [target]) for name in linear):
            continue
        found = next((type(modules[name]).__name__ for name in modules if matches(name, [target])), None)
        suffixes = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))
        what = f"is a {found}, not a linear layer" if found else "matches no layer"
        raise ModelError(f"adapter target '{target}' {what}; linear layers of this model end in: {suffixes}")
    return [name for name in linear if matches(name, targets)]


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def inject(
    model: nn.Module, names: Sequence[str], *, rank: int, alpha: float, user_dim: int, dropout: float, context: UserContext
) -> dict[str, PLoRALinear]:
    """Replace each named linear layer by a PLoRALinear around it; returns them by name."""
    layers = {}
    for name in names:
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear)
        layers[name] = PLoRALinear(base, rank=rank, alpha=alpha, user_dim=user_dim, dropout=dropout, context=context, name=name)
        _replace(model, name, layers[name])
    return layers


def fold(model: nn.Module, layers: dict[str, PLoRALinear]) -> dict[str, FoldedLinear]:
    """Replace each training layer by its serving form, in place; returns the new layers by name."""
    folded = {}
    for name, layer in layers.items():
        folded[name] = FoldedLinear(layer)
        _replace(model, name, folded[name])
    return folded
