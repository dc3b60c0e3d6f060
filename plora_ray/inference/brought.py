"""An adapter that somebody brings from elsewhere, checked before it is believed."""

from __future__ import annotations

import numpy as np

from plora_ray.errors import DataError
from plora_ray.inference.loading import LoadedGeneration


def check_brought(loaded: LoadedGeneration, record: np.ndarray) -> np.ndarray:
    """The record as float32 [width]. Raises DataError, saying what was expected, unless it may be an adapter of this generation."""
    width = loaded.model.user_width
    if record.dtype != np.float32 or record.shape != (width,):
        raise DataError(f"the adapter is {record.dtype} {list(record.shape)}, generation {loaded.name} takes float32 [{width}]")
    if not np.isfinite(record).all():
        raise DataError("the adapter holds NaN or infinite values: fit it again")
    return record
