"""What the users of a generation were trained on, as digests: how the next job finds out who has new rows.

One object beside each segment, safetensors with `keys` uint8 [users, 16] ascending and `digests` uint8 [users, 16]. Users whose
rows nobody knows (folded in from a fresh adapter) aren't in it. Nothing that serves reads it. Knows nothing of how rows are digested.
"""

from __future__ import annotations

import contextlib
import hashlib

import numpy as np

from plora_ray.errors import CorruptObjectError, StoreError
from plora_ray.identity import KEY_BYTES
from plora_ray.store import names
from plora_ray.store.objects import ObjectStore
from plora_ray.store.segments import DIGEST_BYTES, ascending
from plora_ray.store.tensorfile import TensorSpec, encode, parse_header

FORMAT_VERSION = "1"
READ_AT_ONCE = 32


def encode_row_digests(keys: np.ndarray, digests: np.ndarray) -> bytes:
    """The object's bytes. keys uint8 [users, 16] ascending, digests uint8 [users, 16]. Raises StoreError for anything else."""
    if keys.dtype != np.uint8 or digests.dtype != np.uint8 or keys.shape[1:] != (KEY_BYTES,) or digests.shape != (len(keys), DIGEST_BYTES):
        raise StoreError(f"row digests need uint8 [users, 16] keys and digests, got {list(keys.shape)} and {list(digests.shape)}")
    if not ascending(keys):
        raise StoreError("the keys of row digests must be ascending and unique")
    body = [keys.tobytes(), digests.tobytes()]
    return encode(list(zip(_specs(len(keys)), body, strict=True)), {"format_version": FORMAT_VERSION, "checksum": _checksum(*body)})


def decode_row_digests(data: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(keys, digests), checksum verified. Raises CorruptObjectError naming `name`."""
    layout = parse_header(data, name)
    users = layout.tensors[0].shape[0] if layout.tensors and layout.tensors[0].shape else 0
    keys, digests = (data[layout.slice(spec.name)] for spec in layout.tensors) if layout.tensors == _specs(users) else (b"", b"")
    if layout.metadata != {"format_version": FORMAT_VERSION, "checksum": _checksum(keys, digests)} or layout.tensors != _specs(users):
        raise CorruptObjectError(f"{name} doesn't hold row digests of format {FORMAT_VERSION}")
    return np.frombuffer(keys, np.uint8).reshape(-1, KEY_BYTES), np.frombuffer(digests, np.uint8).reshape(-1, DIGEST_BYTES)


def read_row_digests(objects: ObjectStore, generation: str) -> tuple[np.ndarray, np.ndarray]:
    """(keys, digests) of all users of a generation about whose rows the store knows, keys ascending.

    A generation from before there were digests gives none, and a damaged object counts as missing: its users are trained again.
    """
    paths = [item.path for item in objects.list(names.row_digests(generation))]
    found = [np.empty((0, KEY_BYTES + DIGEST_BYTES), np.uint8)]
    for start in range(0, len(paths), READ_AT_ONCE):
        for path, data in objects.read_many(paths[start : start + READ_AT_ONCE]).items():
            with contextlib.suppress(CorruptObjectError):
                found.append(np.concatenate(decode_row_digests(data, objects.uri_of(path)), axis=1))
    both = np.concatenate(found)
    both = both[np.lexsort(both[:, KEY_BYTES - 1 :: -1].T)]
    return np.ascontiguousarray(both[:, :KEY_BYTES]), np.ascontiguousarray(both[:, KEY_BYTES:])


def _specs(users: int) -> tuple[TensorSpec, ...]:
    return TensorSpec("keys", "U8", (users, KEY_BYTES)), TensorSpec("digests", "U8", (users, DIGEST_BYTES))


def _checksum(keys: bytes, digests: bytes) -> str:
    return hashlib.blake2b(keys + digests, digest_size=DIGEST_BYTES).hexdigest()
