"""Who a user is to the system: a validated id outside, a keyed 16-byte hash inside.

Raw ids never reach object names, logs or metrics; every room below HTTP and data loading speaks in user keys.
The hash is keyed so that whoever can list object names can't test guesses of user ids without the store's key.
"""

from __future__ import annotations

import hashlib

import numpy as np

from plora_ray.errors import InvalidUserId

KEY_BYTES = 16
MAX_USER_ID_BYTES = 512


def validate_user_id(user_id: object) -> str:
    """Return `user_id` unchanged if it is usable; any printable text up to 512 bytes of UTF-8 is.

    Raises InvalidUserId with the reason (the id itself isn't repeated: it may be personal).
    """
    if not isinstance(user_id, str):
        raise InvalidUserId(f"user_id must be a string, got {type(user_id).__name__}")
    if not user_id.strip():
        raise InvalidUserId("user_id is empty: give every row and request a non-blank user_id")
    try:
        encoded = user_id.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidUserId("user_id is not valid Unicode (lone surrogate)") from error
    if len(encoded) > MAX_USER_ID_BYTES:
        raise InvalidUserId(f"user_id has {len(encoded)} bytes of UTF-8; at most {MAX_USER_ID_BYTES} are allowed")
    if user_id in (".", ".."):
        raise InvalidUserId(f"user_id {user_id!r} can't be part of a URL: choose another")
    if any(ord(char) < 32 or ord(char) == 127 for char in user_id):
        raise InvalidUserId("user_id contains control characters")
    return user_id


def user_key(user_id: str, secret: bytes) -> bytes:
    """The user's 16-byte key: BLAKE2b of the id, keyed with the store's secret. Uniform, so it also partitions users."""
    return hashlib.blake2b(user_id.encode("utf-8"), key=secret, digest_size=KEY_BYTES).digest()


def as_words(keys: np.ndarray) -> np.ndarray:
    """Keys uint8 [users, 16] as [users] items that compare as the byte strings do."""
    return np.ascontiguousarray(keys).view(f"V{KEY_BYTES}").ravel()


def partition_of(key: bytes, partitions: int) -> int:
    """Which of `partitions` equal ranges of key space `key` lies in; monotone in the key, so partitions are hash ranges."""
    return (int.from_bytes(key[:4], "big") * partitions) >> 32
