"""Generations and engines as the settings under `serving:` want them. Whoever answers with a generation begins here."""

from __future__ import annotations

from pathlib import Path

import torch

from plora_ray.adapters.pretrained import DTYPES
from plora_ray.config import ServingSettings
from plora_ray.errors import ConfigError, InvalidUserId
from plora_ray.inference.disk_tier import DiskTier
from plora_ray.inference.engine import InferenceEngine
from plora_ray.inference.loading import LoadedGeneration, load_generation
from plora_ray.inference.observer import EngineObserver
from plora_ray.store import AdapterStore


def open_for_serving(store: AdapterStore, generation: str | None, serving: ServingSettings) -> LoadedGeneration:
    """The generation (the current one for None), folded, on the device and in the precision of the settings.

    Raises ConfigError if a GPU is asked for and none is visible, and as `load_generation` does.
    """
    device = "cuda" if serving.replica_gpus > 0 else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("serving.replica_gpus is set, but torch sees no GPU here: set it to 0 or install torch with CUDA")
    dtype = DTYPES[serving.dtype] if serving.dtype != "auto" else torch.bfloat16 if device == "cuda" else torch.float32
    return load_generation(store, generation, dtype=dtype, device=device)


class EngineBuilder:
    """Builds engines of one process: they share its disk tier, lists of users and observer.

    Raises ConfigError if a list or the disk's directory can't be used.
    """

    def __init__(self, serving: ServingSettings, observer: EngineObserver | None = None) -> None:
        self._serving, self._observer = serving, observer
        self._disk = DiskTier(serving.disk_cache_dir, serving.disk_cache_bytes) if serving.disk_cache_dir is not None else None
        self._pinned, self._prefetched = _user_ids(serving.pin_users_file), _user_ids(serving.prefetch_users_file)

    def build(self, loaded: LoadedGeneration) -> InferenceEngine:
        """An engine around the generation; pinned and prefetched users are in memory when this returns.

        Raises ConfigError for what doesn't fit the budget, StoreError if the store can't be read.
        """
        serving = self._serving
        return InferenceEngine(
            loaded, batch_tokens=serving.batch_tokens, batch_rows=serving.batch_rows, wait_s=serving.batch_wait_ms / 1000,
            queued_texts=serving.limits.queued_texts, cache_bytes=serving.cache_bytes, max_age_s=serving.adapter_max_age_s,
            unknown_ttl_s=serving.unknown_user_ttl_s, store_wait_s=serving.store_wait_s, resident=serving.resident, disk=self._disk,
            pinned=_keys(loaded, self._pinned, "pin_users_file"), prefetched=_keys(loaded, self._prefetched, "prefetch_users_file"),
            compiled=serving.compile, observer=self._observer,
        )  # fmt: skip


def _user_ids(path: Path | None) -> list[str]:
    """The ids in a file, one a line; blank lines don't count."""
    if path is None:
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the list of users {path} can't be read ({error}): it must be UTF-8 text with one user id a line") from error
    return list(dict.fromkeys(line.strip() for line in lines if line.strip()))


def _keys(loaded: LoadedGeneration, users: list[str], setting: str) -> list[bytes]:
    try:
        return [loaded.store.key(user) for user in users]
    except InvalidUserId as error:
        raise ConfigError(f"serving.{setting} holds a line that is no user id: {error}") from error
