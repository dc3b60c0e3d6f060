"""Sealed bytes: AES-256-GCM (NIST SP 800-38D) with a random nonce, bound to where they belong.

    nonce [12]  ciphertext [as many bytes as the plain ones]  tag [16]

What the bytes are bound to is authenticated with them and stored nowhere: moved to another place, they don't open. The associated
data are the parts, each after its length as 4 bytes, big-endian. Knows nothing of where keys come from.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

ALGORITHM = "AES-256-GCM"
KEY_BYTES = 32
NONCE_BYTES = 12
TAG_BYTES = 16
SEAL_BYTES = NONCE_BYTES + TAG_BYTES  # how much longer sealed bytes are


_RECORD = b"plora-record"


class SealBroken(Exception):
    """The bytes were sealed under another key or for another place, or are damaged."""


@dataclass(frozen=True)
class Place:
    """What a record belongs to. basis: SHA-256 of the shared weights, which stands for the model. kind: plora, lora, or fresh."""

    generation: str
    basis: str
    kind: str

    def parts(self, store_id: str, user: bytes) -> tuple[bytes, ...]:
        """What a record is bound to, as associated data."""
        return _RECORD, store_id.encode(), user, self.generation.encode(), self.basis.encode(), self.kind.encode()


def new_key() -> bytes:
    """32 random bytes."""
    return os.urandom(KEY_BYTES)


def seal(key: bytes, plain: bytes | memoryview, *bound_to: bytes) -> bytes:
    """`plain`, sealed under the 32-byte `key` for the place that `bound_to` names."""
    nonce = os.urandom(NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, plain, _associated(bound_to))


def unseal(key: bytes, sealed: bytes | memoryview, *bound_to: bytes) -> bytes:
    """The bytes that were sealed. Raises SealBroken unless key, place and bytes are those of then."""
    if len(sealed) < SEAL_BYTES:
        raise SealBroken
    try:
        return AESGCM(key).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], _associated(bound_to))
    except InvalidTag as error:
        raise SealBroken from error


def stored_bytes(width: int, sealed: bool) -> int:
    """Bytes of a record of `width` float32 numbers as it is stored."""
    return width * 4 + (SEAL_BYTES if sealed else 0)


def is_sealed(stored: np.ndarray) -> bool:
    """Whether a record as it is stored, or an array of them, is sealed: then it is uint8, else float32."""
    return stored.dtype == np.uint8


def _associated(parts: tuple[bytes, ...]) -> bytes:
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)
