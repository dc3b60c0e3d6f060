"""A generation without its users: what a device needs to fit an adapter of its own. Nobody else's adapter gets there."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping
from typing import Any

from plora_ray.errors import CorruptObjectError
from plora_ray.inference.loading import LoadedGeneration, load_generation
from plora_ray.store import AdapterStore, ModelRef


def open_shared(description: Mapping[str, Any], shared: bytes) -> LoadedGeneration:
    """The generation that a server described, built from its shared parameters in this process's memory, with no user in it.

    description: `generation`, `kind`, `basis`, `model` and `adapter_config`, as the server gives them (`Client.shared`). shared: its
    shared.safetensors. Raises CorruptObjectError if that isn't the one of `basis`, ModelError if the PLM here has other weights.
    """
    if hashlib.sha256(shared).hexdigest() != description["basis"]:
        raise CorruptObjectError(f"these aren't the shared parameters of generation {description['generation']}: fetch them again")
    store = AdapterStore(f"memory://on-device-{uuid.uuid4().hex}")
    writer = store.begin(description["generation"], description["kind"])
    writer.copy_shared(shared)
    writer.commit(expected_users=0, model=ModelRef(**description["model"]), adapter_config=dict(description["adapter_config"]))
    return load_generation(store)
