"""PLoRA on Ray: one frozen language model, one tiny adapter for every user.

The names here load on first use, so that light parts (the HTTP client, the store) don't import torch models.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plora_ray.adapters import PersonalizedModel
    from plora_ray.client import AsyncClient, Client
    from plora_ray.inference import InferenceEngine
    from plora_ray.store import AdapterStore

__version__ = "0.1.0"
__all__ = ["AdapterStore", "AsyncClient", "Client", "InferenceEngine", "PersonalizedModel", "__version__"]

_HOMES = {
    "AdapterStore": "plora_ray.store",
    "AsyncClient": "plora_ray.client",
    "Client": "plora_ray.client",
    "InferenceEngine": "plora_ray.inference",
    "PersonalizedModel": "plora_ray.adapters",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'plora_ray' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
