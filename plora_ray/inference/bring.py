"""A user's model from a PEFT checkpoint directory, as `plora users export` writes it, back into the store.

Nothing in the directory is believed: safetensors only, of bounded size, with exactly the names, shapes and numbers that an adapter of the
generation has. Knows files and the store; the maths are in plora_ray/adapters/peft_import.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from plora_ray.adapters.peft_import import check_config, expected_shapes, record_from_peft
from plora_ray.errors import DataError
from plora_ray.inference.brought import check_brought
from plora_ray.inference.loading import LoadedGeneration, load_generation
from plora_ray.inference.reach import distances
from plora_ray.store import AdapterStore, UserAdapter

FARTHEST = 10.0  # in the measure of plora_ray/inference/reach.py: users as the prior expects them lie around 1
MAX_JSON_BYTES = 2**20
MAX_HEADER_BYTES = 2**20
MAX_EXAMPLES = 2**31 - 1


def import_user(store: AdapterStore, user_id: str, folder: Path) -> UserAdapter:
    """Make the checkpoint in `folder` the user's newest adapter in the current generation.

    Raises DataError, with nothing written, if it isn't a checkpoint of this generation; ErasedDuringFit if the user is erased meanwhile.
    """
    loaded = load_generation(store, fold=False)
    key = store.key(user_id)
    erased = store.tombstones().get(key)
    config = _json(folder / "adapter_config.json")
    check_config(loaded.model, config)
    tensors = _tensors(folder / "adapter_model.safetensors", expected_shapes(loaded.model))
    head = _head(loaded, folder / "head.safetensors")
    record = check_brought(loaded, record_from_peft(loaded.model, tensors, head).numpy())
    distance = float(distances(loaded, torch.from_numpy(record).unsqueeze(0)))
    if not distance <= FARTHEST:
        raise DataError(f"the adapter lies {distance:.3g} times as far out as users do, more than {FARTHEST:g}: fit it again")
    return loaded.put_fresh(key, np.ascontiguousarray(record), _examples(folder / "plora.json"), erased)


def _head(loaded: LoadedGeneration, path: Path) -> dict[str, Tensor] | None:
    """The checkpoint's head, where it has one: without it the adapter is meant for the generation's."""
    if not path.exists():
        return None
    return _tensors(path, {name: tuple(getattr(loaded.model.head, name).shape) for name in ("weight", "bias")})


def _tensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Exactly these float32 tensors, finite. Raises DataError for anything else, before it reads more than they need."""
    needed = sum(4 * int(np.prod(shape)) for shape in shapes.values())
    data = _read(path, needed + MAX_HEADER_BYTES)
    try:
        tensors = load(data)
    except (SafetensorError, ValueError) as error:
        raise DataError(f"{path} is no safetensors file: {' '.join(str(error).split())[:200]}") from None
    if tensors.keys() != shapes.keys():
        name = sorted(tensors.keys() ^ shapes.keys())[0]
        raise DataError(f"{path} has other tensors than this generation's adapters: {name!r:.120} is on one side only")
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or tuple(tensor.shape) != shapes[name]:
            raise DataError(f"{path}: {name} is {tensor.dtype} {list(tensor.shape)}, expected float32 {list(shapes[name])}")
        if not bool(torch.isfinite(tensor).all()):
            raise DataError(f"{path}: {name} holds NaN or infinite values: fit it again")
    return tensors


def _examples(path: Path) -> int:
    """How many examples the exporter says it was fitted on; 0 if nobody says."""
    found = _json(path).get("examples", 0) if path.exists() else 0
    if type(found) is not int or not 0 <= found <= MAX_EXAMPLES:
        raise DataError(f"{path}: examples must be a whole number from 0 to {MAX_EXAMPLES}")
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(_read(path, MAX_JSON_BYTES))
    except (ValueError, RecursionError):
        raise DataError(f"{path} is no JSON") from None
    if not isinstance(values, dict):
        raise DataError(f"{path} holds no JSON object")
    return values


def _read(path: Path, most_bytes: int) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(most_bytes + 1)
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror or error}") from None
    if len(data) > most_bytes:
        raise DataError(f"{path} is larger than the {most_bytes:,} bytes that it can have here")
    return data
