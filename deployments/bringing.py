"""Adapters fitted elsewhere, on a device say, so that texts never leave it: read from a request and stored, never believed.

The body is a safetensors file, as the safetensors library writes it: one tensor `record`, float32 [width], and the metadata `basis`, the
SHA-256 of the shared.safetensors that it was fitted with. Nothing else is taken.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import torch

from deployments.problems import Problem
from plora_ray.errors import CorruptObjectError
from plora_ray.inference import LoadedGeneration
from plora_ray.inference.brought import check_brought
from plora_ray.inference.reach import distances
from plora_ray.store import UserAdapter
from plora_ray.store.tensorfile import TensorSpec, parse_header

MEDIA_TYPE = "application/octet-stream"
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class BroughtAdapter:
    """record: float32 [width]. basis: SHA-256, hex, of the shared parameters it belongs to."""

    record: np.ndarray
    basis: str


def decode_brought(body: bytes) -> BroughtAdapter:
    """The adapter in a request's body. Raises Problem 422 for anything but the exact form."""
    try:
        layout = parse_header(body, "the body")
    except CorruptObjectError as error:
        raise _unreadable(str(error)) from None
    sizes = layout.tensors[0].shape if len(layout.tensors) == 1 else ()
    if len(sizes) != 1 or layout.tensors != (TensorSpec("record", "F32", sizes),):
        raise _unreadable("it must hold one tensor, 'record', of F32 [width]")
    basis = layout.metadata.get("basis", "")
    if set(layout.metadata) != {"basis"} or not _SHA256.fullmatch(basis):
        raise _unreadable("its metadata must be 'basis', 64 hex digits, and nothing else")
    return BroughtAdapter(np.frombuffer(body[layout.slice("record")], "<f4"), basis)


def store_brought(loaded: LoadedGeneration, key: bytes, brought: BroughtAdapter, farthest: float) -> UserAdapter:
    """Check the adapter against the generation that answers its user and store it. Blocks.

    farthest: see plora_ray/inference/reach.py. Raises Problem 409 for other shared parameters, Problem 422 or DataError for what can't be
    an adapter, StoreError.
    """
    if brought.basis != loaded.reader.basis:
        raise Problem(409, f"the adapter was fitted with other shared parameters than those of {loaded.name}, which answers this user")
    record = check_brought(loaded, brought.record)
    if float(distances(loaded, torch.tensor(record).unsqueeze(0))) > farthest:
        raise Problem(422, "the adapter lies further from the population than this server takes (serving.limits.adapter_norm)")
    erased = loaded.store.tombstones().get(key)
    return loaded.put_fresh(key, record, 0, erased)


def _unreadable(reason: str) -> Problem:
    return Problem(422, f"the body is no adapter: {reason}", fields=[("body", reason)])
