"""A store with one published generation, and the engine that serves it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from plora_ray.inference import InferenceEngine, load_generation
from plora_ray.store import AdapterStore
from tests.generations import publish

USERS = [f"person {index}" for index in range(20)]
TEXTS = ["a short text", "another text that is quite a bit longer than the first one", "x", "what do you think of this?"]


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(str(tmp_path / "store"))


@pytest.fixture
def engine(store: AdapterStore, tiny_plm: str) -> Iterator[InferenceEngine]:
    publish(store, tiny_plm, "g1", USERS)
    engine = InferenceEngine(load_generation(store))
    yield engine
    engine.close()
