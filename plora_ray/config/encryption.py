"""How what the store holds of users is encrypted: by the store itself, and by the S3 service."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from plora_ray.config.section import Section
from plora_ray.store.encryption.root_key import RootKeySource


class EncryptionSettings(Section):
    """Where the root key comes from: a file or an environment variable that holds 64 hex digits, or a key of AWS KMS.

    Exactly one of the three. The file, or the variable, must be there on every node: the key never travels.
    """

    key_file: Path | None = None
    key_env: str | None = Field(None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    kms_key_id: str | None = Field(None, min_length=1)

    @field_validator("key_file")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return None if value is None else value.absolute()  # workers have other working directories

    @model_validator(mode="after")
    def _one_source(self) -> EncryptionSettings:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"set exactly one of key_file, key_env and kms_key_id, not {' and '.join(given) or 'none'}")
        return self

    def root_key(self, region: str | None) -> RootKeySource:
        """Where the store finds the root key. region: of KMS."""
        return RootKeySource(self.key_file, self.key_env, self.kms_key_id, region if self.kms_key_id is not None else None)


class ServerSideSettings(Section):
    """What S3 is asked to encrypt every object with: AES256 (keys of S3) or aws:kms (the key kms_key_id, or the account's default)."""

    mode: Literal["AES256", "aws:kms"]
    kms_key_id: str | None = None

    @model_validator(mode="after")
    def _key_belongs_to_kms(self) -> ServerSideSettings:
        if self.kms_key_id is not None and self.mode != "aws:kms":
            raise ValueError(f"kms_key_id means nothing with mode {self.mode}: set mode to aws:kms or remove it")
        return self

    def put_arguments(self) -> dict[str, str]:
        """What every PUT carries."""
        key = {"SSEKMSKeyId": self.kms_key_id} if self.kms_key_id is not None else {}
        return {"ServerSideEncryption": self.mode, **key}
