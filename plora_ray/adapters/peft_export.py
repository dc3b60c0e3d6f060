"""One user's model in the terms of Hugging Face PEFT.

    plora   y = W x + b + s * B (A x + q + P p_u)
    PEFT    y = W x + b + s * (B' A' x + b')        with lora_bias      =>      A' = A, B' = B, b' = B (q + P p_u)
    lora    y = W x + b + s * B_u A_u x             is PEFT's plain LoRA       =>      A' = A_u, B' = B_u

Exact, not an approximation, because the user's term of plora doesn't depend on x. Knows names and tensors; writes no files and needs
no PEFT.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from plora_ray.adapters.model import PersonalizedModel

PREFIX = "base_model.model."  # what PEFT puts before the names of a base model's modules


def peft_tensors(model: PersonalizedModel, user_vector: Tensor) -> dict[str, Tensor]:
    """The adapter's weights, float32, under PEFT's names.

    model: in the training form (not folded). user_vector: [user_width].
    """
    if model.spec.kind == "lora":
        return _private_tensors(model, user_vector)
    shared = {name: parameter.detach().float().cpu() for name, parameter in model.shared_parameters().items()}
    tensors = {}
    for layer in adapted_layers(model):
        a, b, p, q = (shared[f"layers.{layer}.{part}"] for part in ("A", "B", "P", "q"))
        bias = b.double() @ (q.double() + p.double() @ user_vector.double().cpu())
        tensors[f"{PREFIX}{layer}.lora_A.weight"] = a.contiguous()
        tensors[f"{PREFIX}{layer}.lora_B.weight"] = b.contiguous()
        tensors[f"{PREFIX}{layer}.lora_B.bias"] = bias.float()
    return tensors


def _private_tensors(model: PersonalizedModel, user_vector: Tensor) -> dict[str, Tensor]:
    tensors = {}
    for layer, (a, b) in model.user_matrices(user_vector.detach().float().cpu()).items():
        tensors[f"{PREFIX}{layer}.lora_A.weight"] = a.contiguous().clone()
        tensors[f"{PREFIX}{layer}.lora_B.weight"] = b.contiguous().clone()
    return tensors


def head_tensors(model: PersonalizedModel, user_vector: Tensor) -> dict[str, Tensor]:
    """The user's task head: `weight` [outputs, hidden] and `bias` [outputs], float32; PEFT knows no such head.

    user_vector: [user_width]. For a head that hears no user it is everybody's.
    """
    weight, bias = model.head.of_user(user_vector)
    return {"weight": weight.float().contiguous(), "bias": bias.float().contiguous()}


def peft_config(model: PersonalizedModel) -> dict[str, Any]:
    """adapter_config.json: exactly the layers that have adapters, by their full names."""
    spec = model.spec
    return {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": spec.model,
        "inference_mode": True,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": 0.0,
        "lora_bias": spec.kind == "plora",
        "target_modules": adapted_layers(model),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }


def adapted_layers(model: PersonalizedModel) -> list[str]:
    """Names of the layers with adapters, in model order, as modules of the PLM are called."""
    ending = ".A"
    return [name[len("layers.") : -len(ending)] for name in model.shared_parameters() if name.endswith(ending)]


def can_merge(model: PersonalizedModel) -> bool:
    """Whether PEFT can merge the adapter into the base weights: a user's bias needs a bias to be added to."""
    biases = (getattr(model.plm.get_submodule(layer), "bias", None) for layer in adapted_layers(model))
    return model.spec.kind == "lora" or all(bias is not None for bias in biases)
