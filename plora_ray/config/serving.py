"""The HTTP application: its size, limits and doors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from plora_ray.config.section import Section


class AuthSettings(Section):
    """Bearer tokens (JWT). The verification key comes from the environment variable or the file named here.

    algorithm None turns authentication off: for local runs, said loudly at start.
    """

    algorithm: Literal["HS256", "RS256", "ES256"] | None = None
    key_env: str = "PLORA_JWT_KEY"
    key_file: Path | None = None
    issuer: str | None = None
    audience: str | None = None


class LimitSettings(Section):
    """What one request may ask for; beyond it the answer is 413 or 422, before any work."""

    body_bytes: int = Field(2_000_000, ge=1024)
    inputs: int = Field(1024, ge=1)
    text_chars: int = Field(20_000, ge=1)
    examples: int = Field(256, ge=1)
    queued_texts: int = Field(8192, ge=1)


class ServingSettings(Section):
    """The HTTP application. proxy haproxy: one hop, the production default; serve: the plain Ray Serve proxy.

    refresh_s: how often a replica looks for a new generation and for erased users. adapter_max_age_s: after this long a cached
    adapter is compared with the store again, which bounds how late a replica follows adaptations made elsewhere.
    resident: whether a replica holds all records of the generation in memory; auto: if they fit cache_bytes. disk_cache_dir: where
    records are kept on a local disk, up to disk_cache_bytes. pin_users_file, prefetch_users_file: user ids, one a line, whose adapters
    are loaded when a generation is; pinned ones are never evicted. store_wait_s: how long a request waits for the store.
    dtype auto: bf16 on a GPU, fp32 on a CPU. model_name: what the Open Inference Protocol calls the model.
    replicas: a number, or [min, max] that follows the load.
    """

    replicas: int | tuple[int, int] = 1
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
    limits: LimitSettings = LimitSettings()
    auth: AuthSettings = AuthSettings()

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
