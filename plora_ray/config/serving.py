"""The HTTP application: its size, limits and doors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from plora_ray.config.section import Section

_THIS_MACHINE = ("127.0.0.1", "localhost", "::1")


class AuthSettings(Section):
    """Bearer tokens (JWT). One key comes from the environment variable or key_file; many, by their `kid`, from a JWK set (RFC 7517).

    algorithm None turns authentication off: for local runs, said loudly at start.
    """

    algorithm: Literal["HS256", "RS256", "ES256"] | None = None
    key_env: str = "PLORA_JWT_KEY"
    key_file: Path | None = None
    jwks_url: str | None = None
    jwks_file: Path | None = None
    issuer: str | None = None
    audience: str | None = None

    @model_validator(mode="after")
    def _keys_come_from_one_place(self) -> AuthSettings:
        places = [name for name in ("key_file", "jwks_url", "jwks_file") if getattr(self, name) is not None]
        if len(places) > 1:
            raise ValueError(f"serving.auth.{places[0]} and serving.auth.{places[1]} are both set: keys come from one place, remove one")
        if self.algorithm == "HS256" and places and places[0] != "key_file":
            raise ValueError(f"serving.auth.{places[0]} holds public keys, HS256 has none: set serving.auth.algorithm to RS256 or ES256")
        if self.jwks_url is not None:
            url = urlsplit(self.jwks_url)
            if url.scheme != "https" and not (url.scheme == "http" and url.hostname in _THIS_MACHINE):
                raise ValueError("serving.auth.jwks_url must begin with https://; http:// is taken for this machine only")
            if url.username or url.password:
                raise ValueError("serving.auth.jwks_url holds a user name or password: keys that verify are public, remove it")
        return self


class LimitSettings(Section):
    """What one request may ask for; beyond it the answer is 413 or 422, before any work. And how many of them: 429.

    requests_per_minute, requests_burst: of one token's subject, at one replica; None: any number. adaptations_per_minute: of one
    user, at one replica. adapter_norm: how far an adapter may lie from the population (plora_ray/inference/reach.py).
    """

    body_bytes: int = Field(2_000_000, ge=1024)
    inputs: int = Field(1024, ge=1)
    text_chars: int = Field(20_000, ge=1)
    examples: int = Field(256, ge=1)
    queued_texts: int = Field(8192, ge=1)
    requests_per_minute: float | None = Field(None, gt=0)
    requests_burst: int = Field(60, ge=1)
    adaptations_per_minute: int = Field(60, ge=1)
    adapter_norm: float = Field(3.0, gt=0)


class AuditSettings(Section):
    """Who adapted, erased, brought an adapter or moved generations: a JSON line each, to the replica's log or to a file of each node."""

    enabled: bool = True
    file: Path | None = None


class ServingSettings(Section):
    """The HTTP application. proxy haproxy: one hop, the production default; serve: the plain Ray Serve proxy.

    refresh_s: how often a replica looks for a new generation and for erased users. adapter_max_age_s: after this long a cached
    adapter is compared with the store again, which bounds how late a replica follows adaptations made elsewhere.
    resident: whether a replica holds all records of the generation in memory; auto: if they fit cache_bytes. disk_cache_dir: where
    records are kept on a local disk, up to disk_cache_bytes. pin_users_file, prefetch_users_file: user ids, one a line, whose adapters
    are loaded when a generation is; pinned ones are never evicted. store_wait_s: how long a request waits for the store.
    dtype auto: bf16 on a GPU, fp32 on a CPU. model_name: what the Open Inference Protocol calls the model. give_shared: whether
    callers with scope adapt may read the shared parameters, to fit adapters themselves.
    replicas: a number, or [min, max] that follows the load; scale_up_after_s, scale_down_after_s: how long the load must ask for
    more or fewer before there are.
    """

    replicas: int | tuple[int, int] = 1
    scale_up_after_s: float = Field(30.0, ge=0)
    scale_down_after_s: float = Field(600.0, ge=0)
    replica_cpus: float = Field(1.0, ge=0)
    replica_gpus: float = Field(0.0, ge=0)
    proxy: Literal["haproxy", "serve"] = "haproxy"
    host: str = "127.0.0.1"
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = False
    batch_tokens: int = Field(4096, ge=16)
    batch_rows: int = Field(64, ge=1)
    batch_wait_ms: float = Field(2.0, ge=0, le=1000)
    cache_bytes: int = Field(256 * 2**20, ge=0)
    resident: Literal["auto", "on", "off"] = "auto"
    disk_cache_dir: Path | None = None
    disk_cache_bytes: int = Field(10 * 2**30, ge=0)
    pin_users_file: Path | None = None
    prefetch_users_file: Path | None = None
    store_wait_s: float = Field(5.0, gt=0)
    adapter_max_age_s: float = Field(30.0, gt=0)
    unknown_user_ttl_s: float = Field(2.0, ge=0)
    refresh_s: float = Field(1.0, gt=0)
    model_name: str = Field("plora", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    request_timeout_s: float = Field(30.0, gt=0)
    give_shared: bool = False
    limits: LimitSettings = LimitSettings()
    auth: AuthSettings = AuthSettings()
    audit: AuditSettings = AuditSettings()

    @model_validator(mode="after")
    def _callers_are_known_where_they_are_counted(self) -> ServingSettings:
        if self.limits.requests_per_minute is not None and self.auth.algorithm is None:
            raise ValueError("serving.limits.requests_per_minute counts by token: set serving.auth.algorithm, or remove it")
        return self

    @field_validator("replicas", mode="before")
    @classmethod
    def _number_or_range(cls, value: Any) -> Any:
        """One sentence for what would else be a complaint from each type that the value isn't."""
        numbers = value if isinstance(value, list | tuple) and len(value) == 2 else [value]
        if all(type(item) is int and item > 0 for item in numbers) and numbers[0] <= numbers[-1]:
            return value
        raise ValueError("write a number from 1, or [min, max]")

    @property
    def replica_range(self) -> tuple[int, int]:
        """Fewest and most replicas."""
        return self.replicas if isinstance(self.replicas, tuple) else (self.replicas, self.replicas)
