"""What the faults have in common: a tiny job with many short waves, so that a fault lands between two of them; an S3 server that fails."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.s3_server import S3Server
from tests.chaos.faulty_s3 import FaultyS3


@pytest.fixture
def many_waves(tiny_tree: dict[str, Any]) -> dict[str, Any]:
    tiny_tree["data"] = {"source": "synthetic://?users=240&texts=8&pool=80"}
    tiny_tree["training"].update({"users_per_wave": 1, "num_workers": 2, "partitions": 6})
    return tiny_tree


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    """A real S3 server with a bucket, behind what makes it fail."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    with S3Server(tmp_path / "s3") as server:
        server.create_bucket("plora")
        with FaultyS3(server.endpoint_url) as proxy:
            yield proxy
