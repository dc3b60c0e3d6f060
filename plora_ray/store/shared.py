"""The shared weights of a generation as one safetensors file: the same tensors always give the same bytes.

(The safetensors library writes metadata in a random order, so two runs would get two digests for equal weights.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from plora_ray.errors import StoreError
from plora_ray.store.tensorfile import TensorSpec, encode, parse_header

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class SharedWeights:
    """What all users of a generation share: CPU tensors by name, and what the trainer noted about them."""

    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]


def encode_shared(tensors: Mapping[str, torch.Tensor | np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """The file with `tensors` (torch or numpy, any shapes). Raises StoreError for unknown dtypes and values that aren't finite."""
    encoded = []
    for name, value in sorted(tensors.items()):
        tensor = torch.as_tensor(value).detach().cpu().contiguous()
        if tensor.dtype not in _NAMES:
            raise StoreError(f"shared tensor {name} has dtype {tensor.dtype}; known are {', '.join(map(str, _NAMES))}")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise StoreError(f"shared tensor {name} holds NaN or infinite values, so training diverged; nothing was written")
        data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        encoded.append((TensorSpec(name, _NAMES[tensor.dtype], tuple(tensor.shape)), data))
    # Wider items first keeps every tensor aligned.
    encoded.sort(key=lambda item: -_DTYPES[item[0].dtype].itemsize)
    try:
        return encode(encoded, metadata)
    except ValueError as error:
        raise StoreError(f"the shared weights can't be written: {error}") from error


def decode_shared(data: bytes, name: str) -> SharedWeights:
    """The tensors and metadata in `data`. Raises CorruptObjectError naming `name`."""
    layout = parse_header(data, name)
    tensors = {}
    for spec in layout.tensors:
        dtype = _DTYPES[spec.dtype]
        if spec.nbytes:
            flat = torch.frombuffer(bytearray(data[layout.slice(spec.name)]), dtype=dtype)
        else:
            flat = torch.empty(0, dtype=dtype)
        tensors[spec.name] = flat.reshape(spec.shape)
    return SharedWeights(tensors, layout.metadata)
