"""The bucket policies that the docs show give a server what it writes, and nothing of what only a trainer writes."""

from __future__ import annotations

import json
import re
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest
from rendered import ROOT

from plora_ray.store import AdapterStore, ModelRef, UserAdapter, new_version
from plora_ray.store.adapters import now_iso

WIDTH = 4


@pytest.fixture(scope="module")
def policies() -> dict[str, dict[str, list[str]]]:
    """By identity: action -> patterns of the objects, as docs/install.md shows them."""
    shown = re.findall(r"^```json\n(.*?)^```", (ROOT / "docs" / "install.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return dict(zip(("train", "serve"), map(allowed, shown), strict=True))


def allowed(text: str) -> dict[str, list[str]]:
    patterns: dict[str, list[str]] = {}
    for statement in json.loads(text)["Statement"]:
        assert statement["Effect"] == "Allow"
        resources = statement["Resource"] if isinstance(statement["Resource"], list) else [statement["Resource"]]
        for action in statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]:
            patterns.setdefault(action, []).extend(resource.removeprefix("arn:aws:s3:::") for resource in resources)
    return patterns


def may(policy: dict[str, list[str]], action: str, name: str) -> bool:
    return any(fnmatchcase(f"plora/store/{name}", pattern) for pattern in policy.get(action, []))


def written(folder: Path, before: dict[str, bytes]) -> set[str]:
    return {name for name, data in objects(folder).items() if before.get(name) != data}


def objects(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_server_may_write_what_adapting_erasing_and_activating_write_and_nothing_that_a_trainer_publishes(
    policies: dict[str, dict[str, list[str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PLORA_STORE_KEY", raising=False)
    store = AdapterStore(f"file://{tmp_path}")
    key = store.key("ann")
    for name in ("g1", "g2"):
        writer = store.begin(name)
        writer.write_shared({"layers.0.A": np.ones((2, 2), np.float32)}, {})
        writer.write_segment(0, np.frombuffer(key, np.uint8)[None], np.ones((1, WIDTH), np.float32), np.array([3]))
        writer.commit(expected_users=1, model=ModelRef(name="m", weight_hash="0" * 64), adapter_config={})
    published = objects(tmp_path)
    reader = store.open_generation("g2")
    record = np.zeros(WIDTH, np.float32)
    store.put_fresh(UserAdapter(key, record, 2, "g2", new_version(), now_iso(), "fresh", reader.basis))
    store.erase(key)
    store.activate("g1")
    by_server = written(tmp_path, published)
    assert {name.split("/")[0] for name in by_server} == {"users", "erased", "current"}
    assert all(may(policies["serve"], "s3:PutObject", name) for name in by_server), by_server
    by_trainer = {name for name in published if name.startswith("generations/") or name == "store.json"}
    assert len(by_trainer) > 6 and not [name for name in by_trainer if may(policies["serve"], "s3:PutObject", name)]
    assert "s3:DeleteObject" not in policies["serve"]
    for name in {*published, *by_server}:
        assert may(policies["serve"], "s3:GetObject", name)
        assert all(may(policies["train"], f"s3:{verb}Object", name) for verb in ("Get", "Put", "Delete")), name
