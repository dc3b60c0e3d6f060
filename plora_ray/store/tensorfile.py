"""Safetensors files, written and read strictly.

A file is 8 bytes of header length (little-endian), the header as JSON, then the tensors' bytes without gaps. This writer's
header is a pure function of the metadata and the tensors' names, dtypes and shapes; the reader accepts only that very form, so
a duplicate key, an overlap, a gap, trailing bytes or a flipped byte of a header can't pass. `safetensors.safe_open` reads the
result like any other. Knows nothing of users or models.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from plora_ray.errors import CorruptObjectError

MAX_HEADER_BYTES = 2**20
LENGTH_BYTES = 8
ALIGNMENT_BYTES = 8
ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "F16": 2, "BF16": 2, "I32": 4, "F32": 4, "I64": 8, "F64": 8}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a file: safetensors' dtype name and the shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class TensorLayout:
    """A parsed header: the tensors in file order, and where each begins, counted from the start of the file."""

    metadata: dict[str, str]
    tensors: tuple[TensorSpec, ...]
    starts: dict[str, int]
    total_bytes: int

    def slice(self, name: str) -> slice:
        """The bytes of tensor `name` in the file."""
        spec = next(spec for spec in self.tensors if spec.name == name)
        return slice(self.starts[name], self.starts[name] + spec.nbytes)


def encode(tensors: Sequence[tuple[TensorSpec, bytes | memoryview]], metadata: Mapping[str, str]) -> bytes:
    """The file with these tensors, in this order. Raises ValueError when bytes and shape disagree."""
    for spec, data in tensors:
        if len(data) != spec.nbytes:
            raise ValueError(f"tensor {spec.name} has {len(data)} bytes, its shape {spec.shape} of {spec.dtype} needs {spec.nbytes}")
    return b"".join([encode_header([spec for spec, _ in tensors], metadata), *(data for _, data in tensors)])


def encode_header(tensors: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON header, padded with blanks so that the first tensor is aligned. Raises ValueError above 1 MiB."""
    fields: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for spec in tensors:
        if spec.name in fields:
            raise ValueError(f"the tensor name {spec.name!r} is taken")
        fields[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, offset + spec.nbytes]}
        offset += spec.nbytes
    text = json.dumps(fields, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % ALIGNMENT_BYTES)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {len(text)} bytes is larger than the {MAX_HEADER_BYTES} that readers accept")
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def parse_header(data: bytes, name: str, complete: bool = True) -> TensorLayout:
    """Parse the header at the start of `data`, the whole file or (complete=False) a beginning of it.

    Raises CorruptObjectError naming `name` for anything but the exact form that `encode` writes.
    """
    header_bytes = int.from_bytes(data[:LENGTH_BYTES], "little")
    if len(data) < LENGTH_BYTES or not 2 <= header_bytes <= min(MAX_HEADER_BYTES, len(data) - LENGTH_BYTES):
        raise CorruptObjectError(f"{name} is no tensor file: its header is cut short or longer than {MAX_HEADER_BYTES} bytes")
    header = data[: LENGTH_BYTES + header_bytes]
    try:
        fields = json.loads(header[LENGTH_BYTES:], object_pairs_hook=_unique)
        metadata, tensors = _metadata(fields), _tensors(fields)
        if encode_header(tensors, metadata) != header:
            raise ValueError("it isn't in canonical form (offsets, order or spacing)")
    except (ValueError, RecursionError) as error:
        raise CorruptObjectError(f"{name} has a damaged header: {error}") from error
    starts, position = {}, len(header)
    for spec in tensors:
        starts[spec.name] = position
        position += spec.nbytes
    if complete and position != len(data):
        raise CorruptObjectError(f"{name} has {len(data)} bytes, its header declares {position}")
    return TensorLayout(metadata, tensors, starts, position)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("it repeats a key")
    return fields


def _metadata(fields: object) -> dict[str, str]:
    metadata = fields.get("__metadata__") if isinstance(fields, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata aren't strings by name")
    return metadata


def _tensors(fields: dict[str, object]) -> tuple[TensorSpec, ...]:
    specs = []
    for name, entry in fields.items():
        if name == "__metadata__":
            continue
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise ValueError("a tensor has other fields than dtype, shape and data_offsets")
        dtype, shape = entry["dtype"], entry["shape"]
        if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
            raise ValueError(f"unknown dtype {dtype!r:.40}")
        if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 2**48 for size in shape):
            raise ValueError("a shape isn't a list of sizes")
        specs.append(TensorSpec(name, dtype, tuple(shape)))
    return tuple(specs)
