"""What a PEFT checkpoint says of one user, in the terms of a personalised model: the inverse of `peft_export`.

    plora   b_l = B_l P_l p for every layer l        =>      p = argmin sum_l |B_l P_l p - b_l|^2, one vector for all (and the head)
    lora    A', B' of every layer                     =>      the flat record, layer by layer, A before B

A checkpoint is believed only if it is one of this very model: the same layers and shapes, for plora also the same A, B and head, and
biases that one vector explains. Knows names and tensors; reads no files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from plora_ray.adapters.head import UserTerms
from plora_ray.adapters.model import PersonalizedModel
from plora_ray.adapters.peft_export import PREFIX, adapted_layers, head_tensors, peft_config
from plora_ray.errors import DataError

SAME = 1e-5  # of the largest value: as far as two float32 copies of one tensor may differ
EXPLAINED = 1e-3  # of the biases' length: what one vector may leave over
# What of a head is its user's own.
HEARD: dict[UserTerms, tuple[str, ...]] = {"none": (), "bias": ("bias",), "taste": ("weight", "bias")}
# What in a checkpoint's configuration changes the formula: as peft_config says, or, below, never there.
MEANT = ("peft_type", "r", "lora_alpha", "lora_bias", "bias", "fan_in_fan_out", "use_rslora", "use_dora", "modules_to_save")
FOREIGN = (
    "rank_pattern", "alpha_pattern", "layer_replication", "trainable_token_indices", "target_parameters", "use_bdlora", "arrow_config",
)  # fmt: skip
DEFAULTS: dict[str, Any] = {
    "lora_bias": False, "bias": "none", "fan_in_fan_out": False, "use_rslora": False, "use_dora": False, "modules_to_save": None,
}  # fmt: skip


def expected_shapes(model: PersonalizedModel) -> dict[str, tuple[int, ...]]:
    """The tensors of a checkpoint of this model by PEFT's names, and their shapes."""
    shapes: dict[str, tuple[int, ...]] = {}
    shared = model.shared_parameters()
    for layer in adapted_layers(model):
        a, b = shared[f"layers.{layer}.A"], shared[f"layers.{layer}.B"]
        shapes[f"{PREFIX}{layer}.lora_A.weight"] = tuple(a.shape)
        shapes[f"{PREFIX}{layer}.lora_B.weight"] = tuple(b.shape)
        if model.spec.kind == "plora":
            shapes[f"{PREFIX}{layer}.lora_B.bias"] = (b.shape[0],)
    return shapes


def check_config(model: PersonalizedModel, given: Mapping[str, Any]) -> None:
    """Raises DataError unless adapter_config.json describes adapters of this model's form; what it doesn't name has PEFT's default."""
    for name, expected in peft_config(model).items():
        if name in MEANT and given.get(name, DEFAULTS.get(name)) != expected:
            raise DataError(f"the checkpoint has {name} {given.get(name)!r:.60}, this generation's adapters have {expected!r}")
    foreign = [name for name in FOREIGN if given.get(name)]
    if foreign:
        raise DataError(f"the checkpoint has {foreign[0]}, which this generation's adapters have not")


def record_from_peft(model: PersonalizedModel, tensors: Mapping[str, Tensor], head: Mapping[str, Tensor] | None) -> Tensor:
    """The user's vector [user_width], float32, of a checkpoint with the `expected_shapes`, float32 and finite.

    model: in the training form. head: `weight` and `bias` of the checkpoint's task head, if it brings one.
    Raises DataError unless the checkpoint belongs to this model's shared parameters.
    """
    record = _private_record(model, tensors) if model.spec.kind == "lora" else _vector(model, tensors, head)
    if head is not None:
        for name, own in head_tensors(model, record).items():
            _same(f"head.{name}", head[name], own)
    return record


def _private_record(model: PersonalizedModel, tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].flatten() for name in expected_shapes(model)])


def _vector(model: PersonalizedModel, tensors: Mapping[str, Tensor], head: Mapping[str, Tensor] | None) -> Tensor:
    shared = {name: parameter.detach().float().cpu() for name, parameter in model.shared_parameters().items()}
    rows, biases, given = [], [], []
    for layer in adapted_layers(model):
        a, b, p, q = (shared[f"layers.{layer}.{part}"] for part in ("A", "B", "P", "q"))
        _same(f"{layer}.lora_A.weight", tensors[f"{PREFIX}{layer}.lora_A.weight"], a)
        _same(f"{layer}.lora_B.weight", tensors[f"{PREFIX}{layer}.lora_B.weight"], b)
        rows.append(b.double() @ p.double())
        given.append(tensors[f"{PREFIX}{layer}.lora_B.bias"].double())
        biases.append(given[-1] - b.double() @ q.double())
    if head is not None and (parts := HEARD[model.spec.head_terms]):  # it says of the vector what no layer may hear
        everybodys = _head_of(model, torch.zeros(model.user_width), parts)
        rows.append(torch.stack([_head_of(model, unit, parts) - everybodys for unit in torch.eye(model.user_width)], dim=1))
        given.append(torch.cat([head[part].double().flatten() for part in parts]))
        biases.append(given[-1] - everybodys)
    effect, bias, rounding = torch.cat(rows), torch.cat(biases), SAME * torch.cat(given).norm()
    if bias.norm() <= rounding:
        return torch.zeros(model.user_width)  # nothing but everybody's share: whom the guard leaves to the population
    # By pseudo-inverse: a direction in which no layer hears the vector is left at zero.
    vector = torch.linalg.lstsq(effect, bias.unsqueeze(1), driver="gelsd").solution.squeeze(1)
    left = (effect @ vector - bias).norm()
    if left > EXPLAINED * bias.norm() + rounding:
        raise DataError(
            f"no user vector of this generation explains the checkpoint's biases ({left / bias.norm():.0%} of them is left over): "
            "export it anew from the generation that serves"
        )
    return vector.float()


def _head_of(model: PersonalizedModel, vector: Tensor, parts: Sequence[str]) -> Tensor:
    """Flat, float64: these parts of the head that the user with `vector` [d] has."""
    weight, bias = model.head.of_user(vector)
    return torch.cat([{"weight": weight, "bias": bias}[part].flatten() for part in parts])


def _same(name: str, given: Tensor, own: Tensor) -> None:
    if given.shape != own.shape or float((given - own).abs().max()) > SAME * float(own.abs().max()):
        raise DataError(f"the checkpoint's {name} isn't this generation's: it was made for other shared parameters, export it anew")
