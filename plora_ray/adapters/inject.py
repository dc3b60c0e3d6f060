"""Putting adapted layers into a Hugging Face model without editing its code, and turning them into their serving form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from plora_ray.adapters.context import UserContext
from plora_ray.adapters.layers import PLoRALinear
from plora_ray.adapters.private_layers import PrivateLoRALinear
from plora_ray.errors import ModelError

Kind = Literal["plora", "lora"]
AdaptedLinear = PLoRALinear | PrivateLoRALinear


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
    model: nn.Module, names: Sequence[str], *, kind: Kind, rank: int, alpha: float, user_dim: int, dropout: float, context: UserContext
) -> dict[str, AdaptedLinear]:
    """Replace each named linear layer by an adapted one around it; returns them by name."""
    layers: dict[str, AdaptedLinear] = {}
    for name in names:
        base = model.get_submodule(name)
        assert isinstance(base, nn.Linear)
        if kind == "lora":
            layers[name] = PrivateLoRALinear(base, rank=rank, alpha=alpha, dropout=dropout, context=context, name=name)
        else:
            layers[name] = PLoRALinear(base, rank=rank, alpha=alpha, user_dim=user_dim, dropout=dropout, context=context, name=name)
        _replace(model, name, layers[name])
    return layers


def fold(model: nn.Module, layers: dict[str, AdaptedLinear]) -> None:
    """Replace each training layer by its serving form, in place."""
    for name, layer in layers.items():
        _replace(model, name, layer.serving_form())
