"""The objects of a run's folder as values: JSON and arrays, with one error for damage."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from plora_ray.errors import CorruptObjectError


def read_json(data: bytes, name: str) -> dict[str, Any]:
    """The object in `data`. Raises CorruptObjectError naming `name`."""
    try:
        values = json.loads(data)
    except ValueError as error:
        raise CorruptObjectError(f"{name} is damaged: run the job again or delete its folder") from error
    if not isinstance(values, dict):
        raise CorruptObjectError(f"{name} is damaged: run the job again or delete its folder")
    return values


def read_arrays(data: bytes, name: str) -> dict[str, np.ndarray]:
    """The arrays in `data`, by name. Raises CorruptObjectError naming `name`."""
    try:
        return load(data)
    except (SafetensorError, ValueError) as error:
        raise CorruptObjectError(f"{name} is damaged: run the job again or delete its folder") from error
