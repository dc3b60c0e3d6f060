"""The files for `ray up` are what Ray's own validation accepts, and start nodes as the rest of the project expects them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=["aws", "gcp"])
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What Ray makes of the file, offline: its defaults filled in, then its schema and rules."""
    prepared: dict[str, Any] = prepare_config(yaml.safe_load((ROOT / "cluster" / f"{request.param}.yaml").read_text(encoding="utf-8")))
    validate_config(prepared)
    assert prepared["provider"]["type"] == request.param
    return prepared


def test_ray_refuses_a_file_with_a_misspelt_key(config: dict[str, Any]) -> None:
    with pytest.raises(Exception, match="max_worker"):
        validate_config({**config, "max_worker": 1})


def test_the_head_carries_no_work_and_workers_start_by_themselves(config: dict[str, Any]) -> None:
    types = config["available_node_types"]
    assert types[config["head_node_type"]]["resources"]["CPU"] == 0 and types[config["head_node_type"]]["max_workers"] == 0
    assert 0 < types["workers"]["min_workers"] <= types["workers"]["max_workers"] <= config["max_workers"]
    assert "--num-cpus=0" in " ".join(config["head_start_ray_commands"])


def test_every_command_is_shell_and_every_node_asks_for_the_token(config: dict[str, Any]) -> None:
    lists = [value for key, value in config.items() if key.endswith("_commands")]
    for command in [command for commands in lists for command in commands]:
        subprocess.run(["bash", "-n", "-c", command], check=True, timeout=20)
    for role in ("head", "worker"):
        start = config[f"{role}_start_ray_commands"][-1]
        assert "RAY_AUTH_MODE=token" in start and re.search(r"\bray start\b", start)
        assert start.index("plora.env") < start.index("ray start"), "secrets are in the environment before Ray starts"


def test_the_checkout_the_token_and_the_secrets_reach_the_home_of_the_user(config: dict[str, Any]) -> None:
    home = f"/home/{config['auth']['ssh_user']}"
    assert config["file_mounts"] == {
        f"{home}/plora-ray": ".",
        f"{home}/.ray/auth_token": "~/.ray/auth_token",
        f"{home}/plora.env": "~/plora.env",
    }
    assert {".git", ".venv", "var"} <= set(config["rsync_exclude"]), "what is built here isn't for other machines"
    assert "make install PYTHON=python3.11" in config["setup_commands"][-1]
    assert "install:" in (ROOT / "Makefile").read_text(encoding="utf-8")
