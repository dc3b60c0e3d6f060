"""One user's adapter outside a segment: the value that the store hands out, and the fresh object that online adaptation writes.

A fresh object is safetensors with tensors `key` uint8 [16] and `record` float32 [width], or in format 2 the record sealed, uint8
[28 + 4 width]; its metadata hold everything else and a checksum over all. It also remembers when the user was last erased; after an
erasure it holds nothing but that, so that the one read a server makes anyway tells it, too. Knows bytes; doesn't know where objects lie.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
import secrets
import time
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from plora_ray.errors import CorruptObjectError, StoreError
from plora_ray.identity import KEY_BYTES
from plora_ray.store.encryption.sealing import Place, is_sealed
from plora_ray.store.tensorfile import TensorSpec, encode, parse_header

FORMAT_VERSION = "1"
SEALED_FORMAT_VERSION = "2"
FRESH: Final = "fresh"  # the kind that sealed fresh adapters are bound to
_VERSION = re.compile(r"\d{20}-[0-9a-f]{8}")
_METADATA = {"format_version", "examples", "generation", "version", "updated_at", "basis", "erased_version"}


def new_version(after: str | None = None) -> str:
    """A version of now: later ones sort after earlier ones as text, and no two are equal.

    It sorts after `after` too, even where that one came from a machine whose clock is ahead.
    """
    time_ns = time.time_ns() if after is None else max(time.time_ns(), int(after[:20]) + 1)
    return f"{time_ns:020d}-{secrets.token_hex(4)}"


def version_above(version: str) -> str:
    """A version just above `version`: one that is drawn at any later time sorts after it, too."""
    return f"{int(version[:20]) + 1:020d}-{secrets.token_hex(4)}"


def is_version(text: str) -> bool:
    """Whether `text` has the form that `new_version` gives."""
    return _VERSION.fullmatch(text) is not None


def now_iso() -> str:
    """The time as ISO 8601 in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


@dataclass(frozen=True, eq=False)
class UserAdapter:
    """All that is one user's own, as stored.

    key         the user's 16-byte key
    record      float32 [width]; the generation's kind says what the numbers are. Inside the store's room it may be sealed: uint8
    examples    how many training rows it was fitted on
    generation  the generation it was trained in, or whose shared weights it was fitted with
    version     sorts as text: the newer of two adapters of a user has the greater one
    updated_at  ISO 8601
    source      "generation" (from a segment) or "fresh" (from online adaptation)
    basis       SHA-256 (hex) of the shared.safetensors it belongs to; with any other it is meaningless
    """

    key: bytes
    record: np.ndarray
    examples: int
    generation: str
    version: str
    updated_at: str
    source: Literal["generation", "fresh"]
    basis: str

    @property
    def fresh_place(self) -> Place:
        """What the record of a fresh adapter is bound to when it is sealed."""
        return Place(self.generation, self.basis, FRESH)


@dataclass(frozen=True)
class FreshObject:
    """What a fresh object says: the user's adapter, if any, and the version of the user's last erasure, if any."""

    key: bytes
    adapter: UserAdapter | None
    erased_version: str | None = None


def check_adapter(adapter: UserAdapter) -> None:
    """Raises StoreError unless `adapter` may be written: shapes and types right, every number finite."""
    record = adapter.record
    _check_metadata(adapter)
    if not isinstance(record, np.ndarray) or record.dtype != np.float32 or record.ndim != 1 or record.size == 0:
        raise StoreError(f"an adapter's record must be float32 [width], got {getattr(record, 'dtype', type(record).__name__)}")
    if not np.isfinite(record).all():
        raise StoreError("the adapter holds NaN or infinite values, so the fit diverged; nothing was written")


def _check_metadata(adapter: UserAdapter) -> None:
    if len(adapter.key) != KEY_BYTES:
        raise StoreError(f"an adapter's key must have {KEY_BYTES} bytes, got {len(adapter.key)}")
    if not is_version(adapter.version):
        raise StoreError(f"an adapter's version must come from new_version(), got {adapter.version!r}")
    if adapter.examples < 0:
        raise StoreError(f"an adapter's number of examples can't be {adapter.examples}")


def encode_fresh(adapter: UserAdapter, erased_version: str | None = None) -> bytes:
    """The fresh object of `adapter`, for a user last erased at `erased_version`. Raises StoreError as `check_adapter` does.

    A sealed record goes in as it is.
    """
    sealed = is_sealed(adapter.record)
    (_check_metadata if sealed else check_adapter)(adapter)
    metadata = {
        "format_version": SEALED_FORMAT_VERSION if sealed else FORMAT_VERSION,
        "examples": str(adapter.examples),
        "generation": adapter.generation,
        "version": adapter.version,
        "updated_at": adapter.updated_at,
        "basis": adapter.basis,
        "erased_version": erased_version or "",
    }
    return _encode(adapter.key, np.ascontiguousarray(adapter.record), metadata)


def encode_erased(key: bytes, erased_version: str) -> bytes:
    """The fresh object of a user who was erased and has no adapter since."""
    metadata = dict.fromkeys(_METADATA, "") | {"format_version": FORMAT_VERSION, "erased_version": erased_version}
    return _encode(key, np.zeros(0, np.float32), metadata)


def decode_fresh(data: bytes, name: str) -> FreshObject:
    """The fresh object in `data`, checksum verified, its record as it is stored. Raises CorruptObjectError naming `name`."""
    layout = parse_header(data, name)
    metadata = dict(layout.metadata)
    checksum = metadata.pop("checksum", "")
    width = layout.tensors[-1].shape[0] if layout.tensors and len(layout.tensors[-1].shape) == 1 else 0
    sealed = metadata.get("format_version") == SEALED_FORMAT_VERSION
    known = sealed or metadata.get("format_version") == FORMAT_VERSION
    if layout.tensors != _specs(width, sealed) or set(metadata) != _METADATA or not known:
        raise CorruptObjectError(f"{name} isn't a fresh adapter of format {FORMAT_VERSION} or {SEALED_FORMAT_VERSION}")
    key, record_bytes = data[layout.slice("key")], data[layout.slice("record")]
    if _checksum(metadata, key, record_bytes) != checksum:
        raise CorruptObjectError(f"{name} doesn't match its checksum: restore the object or adapt the user again")
    erased_version = metadata["erased_version"] or None
    if width == 0:
        return FreshObject(key, None, erased_version)
    adapter = UserAdapter(
        key=key,
        record=np.frombuffer(record_bytes, np.uint8 if sealed else "<f4"),
        examples=int(metadata["examples"]),
        generation=metadata["generation"],
        version=metadata["version"],
        updated_at=metadata["updated_at"],
        source="fresh",
        basis=metadata["basis"],
    )
    return FreshObject(key, adapter, erased_version)


def _encode(key: bytes, record: np.ndarray, metadata: dict[str, str]) -> bytes:
    sealed = is_sealed(record)
    key_spec, record_spec = _specs(record.size, sealed)
    record_bytes = record.tobytes() if sealed else record.astype("<f4", copy=False).tobytes()
    checksum = _checksum(metadata, key, record_bytes)
    return encode([(key_spec, key), (record_spec, record_bytes)], metadata | {"checksum": checksum})


def _specs(size: int, sealed: bool) -> tuple[TensorSpec, TensorSpec]:
    return TensorSpec("key", "U8", (KEY_BYTES,)), TensorSpec("record", "U8" if sealed else "F32", (size,))


def _checksum(metadata: dict[str, str], key: bytes, record: bytes) -> str:
    digest = hashlib.blake2b(json.dumps(metadata, sort_keys=True).encode(), digest_size=16)
    digest.update(key)
    digest.update(record)
    return digest.hexdigest()
