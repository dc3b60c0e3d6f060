"""Further DeepSpeed settings from a JSON file: what nothing else in a job's configuration decides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from plora_ray.errors import ConfigError
from plora_ray.training.engine import Offload

# Keys of a DeepSpeed configuration that other settings decide, and which ones.
OWN_KEYS = {
    "optimizer": "training.learning_rate and training.weight_decay",
    "scheduler": "training.warmup_fraction",
    "train_batch_size": "training.batch_rows",
    "train_micro_batch_size_per_gpu": "training.batch_rows",
    "gradient_accumulation_steps": "training.batch_rows",
    "managed_gradient_accumulation": "training.batch_rows",
    "gradient_clipping": "training.gradient_clipping",
    "bf16": "model.dtype",
    "bfloat16": "model.dtype",
    "fp16": "model.dtype",
    "amp": "model.dtype",
    "torch_autocast": "model.dtype",
    "zero_optimization.stage": "training.sharding",
    "zero_optimization.offload_param.device": "training.offload",
    "zero_optimization.offload_param.nvme_path": "training.offload_dir",
    "zero_optimization.offload_optimizer": "nothing: what is trained is too small to offload, the frozen model isn't: training.offload",
}
SECTIONS = ("zero_optimization", "zero_optimization.offload_param", "zero_optimization.offload_optimizer")


def read_profile(path: str | Path, offload: Offload = "none") -> dict[str, Any]:
    """The settings in the file, for EngineOptions.

    Raises ConfigError if it can't be read, isn't built as DeepSpeed expects, sets what other settings decide, or says how to offload
    with `offload` none.
    """
    name = f"training.deepspeed_profile {path}"
    try:
        profile = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {name}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"{name} is not valid JSON: {error}") from error
    if not isinstance(profile, dict):
        raise ConfigError(f"{name} must hold an object of DeepSpeed settings, found {type(profile).__name__}")
    for section in SECTIONS:
        value = _at(profile, section)
        if value is not None and not isinstance(value, dict):
            raise ConfigError(f"{name}: '{section}' must be an object, found {type(value).__name__}")
    for key, instead in OWN_KEYS.items():
        if _at(profile, key) is not None:
            raise ConfigError(f"{name} sets '{key}', which is decided by {instead}: take it out")
    if offload == "none" and _at(profile, "zero_optimization.offload_param"):
        raise ConfigError(f"{name} sets 'zero_optimization.offload_param', but training.offload is none: set that to cpu or nvme")
    return profile


def _at(profile: Any, key: str) -> Any:
    """The value of a dotted key; None if there is none."""
    for part in key.split("."):
        profile = profile.get(part) if isinstance(profile, dict) else None
    return profile
