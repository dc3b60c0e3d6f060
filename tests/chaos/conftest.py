"""What the faults have in common: a tiny job with many short waves, so that a fault lands between two of them."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def many_waves(tiny_tree: dict[str, Any]) -> dict[str, Any]:
    tiny_tree["data"] = {"source": "synthetic://?users=240&texts=8&pool=80"}
    tiny_tree["training"].update({"users_per_wave": 1, "num_workers": 2, "partitions": 6})
    return tiny_tree
