"""What the DeepSpeed engine must keep over a restart, sharded and replicated, on real process groups."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from plora_ray.training.engine import EngineOptions, ShardedTrainer, Sharding, agree_on_sharding, choose_sharding

STEPS = 6


def module() -> nn.Module:
    """Sizes that two ranks don't divide."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    net[0].requires_grad_(False)
    return net


def trainer_of(net: nn.Module, sharding: Any) -> ShardedTrainer:
    trained = {"weight": net[2].weight, "bias": net[2].bias}  # type: ignore[index]
    options = EngineOptions(sharding, profile={"zero_optimization": {"stage3_param_persistence_threshold": 0}})
    return ShardedTrainer(net, trained, options=options, learning_rate=0.1, weight_decay=0.01, gradient_clipping=1.0, batch_rows=4)


def train(trainer: ShardedTrainer, first: int, stop: int) -> None:
    for step in range(first, stop):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        trainer.step(lambda engine, x=x: engine(x).square().mean(), 1.0)


def rank(index: int, ranks: int, sharding: str, folder: str) -> None:
    """Train on, from the state in `folder` if there is one, three steps; write the state back."""
    alone = {"CUDA_VISIBLE_DEVICES": "", "MASTER_ADDR": "127.0.0.1"}  # ranks on a CPU, also where there is a GPU
    os.environ.update({"RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": str(ranks), **alone})
    store = dist.FileStore(f"{folder}/rendezvous-{sharding}-{ranks}", ranks)
    dist.init_process_group("gloo", store=store, rank=index, world_size=ranks)
    trainer = trainer_of(module(), sharding)
    kept = Path(folder, "state.pt")
    done = 0
    if kept.exists():
        state = torch.load(kept, weights_only=True)
        done = int(state["steps"])
        trainer.load(state["parameters"])
        trainer.load_moments(state["moments"], done)
    train(trainer, done, done + STEPS // 2)
    state = {"steps": torch.tensor(done + STEPS // 2), "parameters": trainer.gathered(), "moments": trainer.moments()}
    held = torch.tensor(trainer.parameter_bytes_held())
    dist.barrier()
    if index == 0:
        torch.save({**state, "held": held}, kept)
    dist.barrier()
    os._exit(0)  # the state is written; the transport's threads don't always survive an orderly end of so short a process


def run(ranks: int, sharding: str, folder: Path) -> dict[str, Any]:
    mp.spawn(rank, (ranks, sharding, str(folder)), nprocs=ranks)  # type: ignore[no-untyped-call]
    state: dict[str, Any] = torch.load(folder / "state.pt", weights_only=True)
    return state


@pytest.mark.parametrize(
    ("before", "after"), [((2, "zero3"), (1, "zero3")), ((1, "replicated"), (2, "zero3")), ((2, "zero3"), (2, "replicated"))]
)
def test_training_goes_on_exactly_where_it_stopped_with_another_number_of_ranks_or_another_sharding(
    before: tuple[int, str], after: tuple[int, str], tmp_path: Path
) -> None:
    net = module()
    adam = torch.optim.AdamW([net[2].weight, net[2].bias], lr=0.1, weight_decay=0.01)  # type: ignore[index]
    for step in range(STEPS):
        adam.zero_grad()
        net(torch.randn(4, 5, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        nn.utils.clip_grad_norm_([net[2].weight, net[2].bias], 1.0)  # type: ignore[index]
        adam.step()
    first = run(*before, tmp_path)
    second = run(*after, tmp_path)
    assert torch.allclose(second["parameters"]["weight"], net[2].weight.detach(), atol=1e-5)  # type: ignore[index]
    assert torch.allclose(second["parameters"]["bias"], net[2].bias.detach(), atol=1e-5)  # type: ignore[index]
    whole = 4 * (5 * 7 + 7 + 7 * 3 + 3)
    expected = {"zero3": whole / before[0], "replicated": whole}[before[1]]
    assert expected <= int(first["held"]) <= expected * 1.05 + 8


def test_auto_shards_only_a_model_that_would_fill_the_device() -> None:
    assert choose_sharding("auto", 100 * 2**20) == "replicated"
    assert choose_sharding("auto", 2**50) == "zero3"
    assert choose_sharding("replicated", 2**50) == "replicated"


def agreeing(index: int, folder: str, here: list[Sharding]) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/rendezvous", len(here)), rank=index, world_size=len(here))
    Path(folder, f"chosen-{index}").write_text(agree_on_sharding(here[index]))
    dist.barrier()
    os._exit(0)


def test_all_ranks_shard_if_the_device_of_one_of_them_is_too_small_for_a_copy(tmp_path: Path) -> None:
    mp.spawn(agreeing, (str(tmp_path), ["replicated", "zero3"]), nprocs=2)  # type: ignore[no-untyped-call]
    assert [(tmp_path / f"chosen-{index}").read_text() for index in range(2)] == ["zero3", "zero3"]
