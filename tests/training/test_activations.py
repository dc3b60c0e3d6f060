"""What is kept of the lower half: bounded, exact, and gone at the end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from plora_ray.config import parse_settings
from plora_ray.errors import ConfigError
from plora_ray.training.activations import BoundedTensors
from plora_ray.training.engine import require_offload
from plora_ray.training.run_state import run_fingerprint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_come_back_as_they_were_from_memory_and_from_disk_and_the_bounds_hold(dtype: torch.dtype) -> None:
    kept = BoundedTensors(memory_bytes=1000, disk_bytes=2000)
    tensors = {number: torch.randn(3 + number % 4, 8).to(dtype) for number in range(60)}
    for name, tensor in tensors.items():
        kept.put(name, tensor)
    found = {name: value for name in tensors if (value := kept.get(name)) is not None}
    assert all(torch.equal(value, tensors[name]) and value.dtype == dtype for name, value in found.items())
    size = sum(value.numel() * value.element_size() for value in found.values())
    assert 2500 < size <= 3000 and 1500 < kept.bytes_on_disk <= 2000
    assert kept.get(60) is None
    kept.close()
    assert all(kept.get(name) is None for name in tensors)


def test_the_file_has_no_name_so_it_is_gone_however_the_process_ends(tmp_path: Path) -> None:
    script = """
import os, torch
from plora_ray.training.activations import BoundedTensors
kept = BoundedTensors(0, 10**6)
kept.put(1, torch.zeros(1000))
assert kept.get(1) is not None and kept.bytes_on_disk == 4000
print(os.listdir(os.environ["TMPDIR"]), flush=True)
os.kill(os.getpid(), 9)
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == -9 and ended.stdout.strip() == "[]", ended.stderr
    assert not list(tmp_path.iterdir())


def test_a_full_disk_only_ends_the_keeping(monkeypatch: pytest.MonkeyPatch) -> None:
    full = open("/dev/full", "r+b", buffering=0)  # noqa: SIM115  a device that has never room
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: full)
    kept = BoundedTensors(memory_bytes=100, disk_bytes=10**6)
    kept.put(1, torch.ones(5))
    kept.put(2, torch.ones(50))
    assert kept.get(2) is None and kept.get(1) is not None
    kept.close()


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"offload": "cpu", "sharding": "replicated"}, "needs sharding zero3 or auto"),
        ({"offload": "nvme"}, "set offload_dir"),
        ({"offload_dir": "/drive"}, "only used with offload nvme"),
    ],
)
def test_offloading_that_makes_no_sense_is_refused(training: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_settings({"training": training})


def test_nvme_is_refused_in_one_line_where_its_operator_cannot_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")  # no compiler and no ninja
    with pytest.raises(ConfigError, match="install the packages g\\+\\+, ninja-build and libaio-dev") as refused:
        require_offload("nvme")
    assert "\n" not in str(refused.value)


def test_how_the_work_is_done_begins_no_new_run_but_top_layers_do() -> None:
    def fingerprint(**sections: object) -> str:
        return run_fingerprint(parse_settings(dict(sections)), "data", "weights")

    free = {"gradient_checkpointing": True, "offload": "cpu", "deepspeed_profile": "x.json", "activation_cache_mb": 0}
    assert fingerprint(training=free, adapter={"top_layers": 1}) == fingerprint(adapter={"top_layers": 1}) != fingerprint()
