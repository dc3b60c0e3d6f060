"""What is said about memory before a run, against what a process really takes."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import psutil
import torch

from plora_ray.adapters.model import PersonalizedModel
from plora_ray.config import parse_settings
from plora_ray.training.heap import give_back_freed_memory
from plora_ray.training.memory import ModelSize, wave_bytes

USERS, ROWS, DIM, OUTPUTS = 400, 4000, 64, 3
FIT = f"""
import torch
from pathlib import Path
from plora_ray.adapters.fit import Linearisation, UserPrior, solve_users
torch.set_num_threads(1)

def peak():
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024

def fit(users, rows):
    prior = UserPrior(torch.zeros({DIM}, dtype=torch.float64), torch.eye({DIM}, dtype=torch.float64))
    linear = Linearisation(torch.zeros({DIM}), torch.randn(rows, {OUTPUTS}), torch.randn(rows, {OUTPUTS} - 1, {DIM}))
    texts = torch.arange(rows)
    solve_users(linear, texts, torch.randint({OUTPUTS}, (rows,)), texts % users, users, prior, "classification")

fit(2, 8)
before = peak()
fit({USERS}, {ROWS})
print(peak() - before)
"""


def test_fitting_a_wave_takes_about_the_memory_that_was_planned_for_it() -> None:
    settings = parse_settings({"adapter": {"user_dim": DIM}})
    planned = wave_bytes(settings, OUTPUTS, DIM)(USERS, ROWS, 0)
    taken = int(subprocess.run([sys.executable, "-c", FIT], capture_output=True, text=True, check=True).stdout)
    assert 0.6 * planned <= taken <= 1.4 * planned


def test_a_model_is_counted_without_its_weights(tiny_tree: dict[str, Any]) -> None:
    for kind, dtype in (("plora", torch.float32), ("lora", torch.bfloat16)):
        adapter = {"rank": 4, "alpha": 8.0, "user_dim": 8} if kind == "plora" else {"rank": 4, "alpha": 8.0}
        name = "fp32" if dtype is torch.float32 else "bf16"
        settings = parse_settings({**tiny_tree, "adapter": {**adapter, "kind": kind}, "model": {**tiny_tree["model"], "dtype": name}})
        model = PersonalizedModel.from_pretrained(settings.adapter_spec(3), dtype=dtype)
        size = ModelSize.of(settings, 3)
        assert size.parameter_bytes == sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        assert size.user_width == model.user_width


def test_freed_memory_goes_back_to_the_system_though_blocks_behind_it_are_in_use() -> None:
    process = psutil.Process()
    blocks = [np.ones(100_000, np.uint8) for _ in range(3000)]  # too small to be mapped one by one
    last = blocks.pop()
    full = process.memory_info().rss
    blocks.clear()
    give_back_freed_memory()
    assert full - process.memory_info().rss > 200 * 2**20 and last.all()
