"""Stores for the tests: a folder, a real S3 server over HTTP, memory, and an encrypted one; the same sentences must hold on all."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.s3_server import S3Server
from plora_ray.store import AdapterStore, GenerationWriter, ModelRef, RootKeySource, UserAdapter, new_version
from plora_ray.store.adapters import now_iso

WIDTH = 6


@pytest.fixture(autouse=True)
def no_outside_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PLORA_STORE_KEY", raising=False)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        server.create_bucket("adapters")
        yield server


@pytest.fixture
def root_key(monkeypatch: pytest.MonkeyPatch) -> RootKeySource:
    """A root key in the environment."""
    monkeypatch.setenv("TEST_ROOT_KEY", "5a" * 32)
    return RootKeySource(key_env="TEST_ROOT_KEY")


@pytest.fixture(params=["file", "s3", "memory", "encrypted"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, dict[str, Any] | None]:
    """URI and storage options of an empty store."""
    if request.param == "file":
        return f"file://{tmp_path}/store", None
    if request.param in ("memory", "encrypted"):
        return f"memory://{uuid.uuid4().hex}/{request.param}", None
    server: S3Server = request.getfixturevalue("s3_server")
    return f"s3://adapters/{uuid.uuid4().hex}", server.storage_options


@pytest.fixture
def store(place: tuple[str, dict[str, Any] | None], root_key: RootKeySource) -> AdapterStore:
    return AdapterStore(*place, encryption=root_key if place[0].endswith("/encrypted") else None)


Users = dict[bytes, tuple[np.ndarray, int]]  # key -> record float32 [WIDTH], examples


@pytest.fixture
def make_users(store: AdapterStore) -> Callable[..., Users]:
    def make(count: int, seed: int = 0, prefix: str = "user") -> Users:
        generator = np.random.default_rng(seed)
        keys = sorted(store.key(f"{prefix}-{number}") for number in range(count))
        return {key: (generator.standard_normal(WIDTH).astype(np.float32), int(generator.integers(1, 99))) for key in keys}

    return make


def arrays_of(users: Users) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    keys = sorted(users)
    return (
        np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16),
        np.stack([users[key][0] for key in keys]),
        np.array([users[key][1] for key in keys]),
    )


@pytest.fixture
def as_arrays() -> Callable[[Users], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    return arrays_of


@pytest.fixture
def write_waves() -> Callable[..., None]:
    def write(writer: GenerationWriter, users: Users, waves: int = 3) -> None:
        keys, records, examples = arrays_of(users)
        for wave, rows in enumerate(np.array_split(np.arange(len(keys)), waves)):
            writer.write_segment(wave, keys[rows], records[rows], examples[rows])

    return write


@pytest.fixture
def publish(store: AdapterStore, write_waves: Callable[..., None]) -> Callable[..., None]:
    def publish_generation(generation: str, users: Users, shared_value: float = 1.0) -> None:
        writer = store.begin(generation)
        writer.write_shared({"B": np.full((4, 2), shared_value, np.float32)}, {"note": "test"})
        write_waves(writer, users)
        writer.commit(expected_users=len(users), model=ModelRef(name="mini", weight_hash="00"), adapter_config={"rank": 2})

    return publish_generation


@pytest.fixture
def make_fresh(store: AdapterStore) -> Callable[..., UserAdapter]:
    def make(user_id: str, basis: str = "0" * 64, value: float = 7.0, version: str | None = None) -> UserAdapter:
        return UserAdapter(
            key=store.key(user_id),
            record=np.full(WIDTH, value, np.float32),
            examples=4,
            generation="g1",
            version=version or new_version(),
            updated_at=now_iso(),
            source="fresh",
            basis=basis,
        )

    return make
