"""The root key: the one secret that the operator keeps outside the store. It wraps the ring's keys and nothing else.

From a file or an environment variable (64 hex digits), or a key of AWS KMS that never leaves it. A `RootKeySource` says where it
comes from and may travel to other processes; the key itself is read anew wherever it is used.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from plora_ray.errors import StoreError
from plora_ray.store.encryption.kms import KmsRootKey
from plora_ray.store.encryption.sealing import seal, unseal

_HEX = re.compile(r"[0-9a-fA-F]{64}")


class RootKey(Protocol):
    """Wraps 32-byte keys. bound_to: what a wrapped key belongs to, by name; it unwraps for nothing else."""

    def wrap(self, key: bytes, bound_to: dict[str, str]) -> bytes: ...
    def unwrap(self, wrapped: bytes, bound_to: dict[str, str]) -> bytes: ...  # raises SealBroken for another root key's


@dataclass(frozen=True)
class RootKeySource:
    """Where the root key comes from; exactly one of the three. region: of KMS; None: from the environment."""

    key_file: Path | None = None
    key_env: str | None = None
    kms_key_id: str | None = None
    region: str | None = None

    def open(self) -> RootKey:
        """The root key, read now. Raises StoreError if there is none or it can't be one."""
        if self.kms_key_id is not None:
            return KmsRootKey(self.kms_key_id, self.region)
        if self.key_file is not None:
            return LocalRootKey(_key(_read(self.key_file), f"the key file {self.key_file}"))
        assert self.key_env is not None
        return LocalRootKey(_key(os.environ.get(self.key_env, ""), f"the environment variable {self.key_env}"))


class LocalRootKey:
    """A root key in this process's memory: 32 bytes; wraps by AES-256-GCM, the names and values as associated data."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def wrap(self, key: bytes, bound_to: dict[str, str]) -> bytes:
        return seal(self._key, key, *_parts(bound_to))

    def unwrap(self, wrapped: bytes, bound_to: dict[str, str]) -> bytes:
        return unseal(self._key, wrapped, *_parts(bound_to))


def _parts(bound_to: dict[str, str]) -> list[bytes]:
    return [text.encode() for pair in sorted(bound_to.items()) for text in pair]


def _read(path: Path) -> str:
    try:
        return path.read_bytes()[:4096].decode("ascii", "replace")
    except OSError as error:
        raise StoreError(f"can't read the key file {path}: {error.strerror or error}; correct store.encryption.key_file") from error


def _key(text: str, where: str) -> bytes:
    if not text.strip():
        raise StoreError(f"{where} is empty or not set: store.encryption takes the root key from there")
    if not _HEX.fullmatch(text.strip()):
        raise StoreError(f"{where} holds no root key: write 64 hex digits, as `openssl rand -hex 32` prints them")
    return bytes.fromhex(text.strip())
