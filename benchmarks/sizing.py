"""The figures that `plora plan` reckons with: seconds of one core for a text answered, trained on and fitted, and a replica's own memory.

    python -m benchmarks.sizing [--json]

CPU seconds of one thread, not seconds of the clock: other work on the machine takes less from them.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Annotated

import torch
import typer

from benchmarks.figures import Figure, spread
from benchmarks.population import UNDATED, UserRows, join_alone, train_population
from benchmarks.step import MODEL, OUTPUTS, ROWS, TOKENS, PersonalStep
from plora_ray.adapters.model import AdapterSpec, PersonalizedModel

USERS, ROWS_PER_USER = 10, 16
ROUNDS = 9
# What a replica imports; its weights and users come on top.
REPLICA = "import deployments.app, plora_ray.inference, psutil; print(psutil.Process().memory_info().rss)"


def core_seconds(name: str, work: Callable[[], object], rows: int, rounds: int = ROUNDS) -> Figure:
    """CPU seconds a row of `work`, which goes through `rows` rows."""
    work()
    taken = []
    for _ in range(rounds):
        began = time.process_time()
        work()
        taken.append((time.process_time() - began) / rows)
    return spread(name, taken, unit="core seconds", goal=None)


@torch.inference_mode()
def answer() -> Figure:
    """A text of a batch of 32 different users through the folded model."""
    spec = AdapterSpec(model=MODEL, task="classification", outputs=OUTPUTS)
    folded = PersonalizedModel.from_pretrained(spec).fold()
    ids, users = torch.randint(1000, 20_000, (ROWS, TOKENS)), torch.randn(ROWS, spec.user_dim)
    return core_seconds("core_s_per_answer", lambda: folded(ids, torch.ones_like(ids), users), ROWS)


def population_row() -> Figure:
    """A row of the population stage: forward, backward and both optimisers."""
    ids, users = torch.randint(1000, 20_000, (ROWS, TOKENS)), torch.arange(ROWS)
    labels = torch.randint(0, OUTPUTS, (ROWS,))
    join_alone()
    ours = PersonalStep()
    return core_seconds("core_s_per_population_row", lambda: ours.step(ids, torch.ones_like(ids), users, labels), ROWS)


def fitted_row() -> Figure:
    """A row of the user stage, fitted by Newton's method; the population of the same users is trained for it and not counted."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20_000, (USERS, ROWS_PER_USER, TOKENS), generator=generator).tolist()
    labels = ["a", "b"] * (ROWS_PER_USER // 2)
    users = [UserRows(rows, labels, [0] * ROWS_PER_USER, [UNDATED] * ROWS_PER_USER) for rows in ids]
    population = train_population(users, epochs=1, seed=0)
    return core_seconds("core_s_per_fitted_row", lambda: population.fit(users), USERS * ROWS_PER_USER, rounds=3)


def replica_process() -> Figure:
    """Memory of a process that has imported what a replica imports."""
    shown = [subprocess.run([sys.executable, "-c", REPLICA], check=True, capture_output=True, text=True).stdout for _ in range(3)]
    return spread("replica_process_mib", [int(text.split()[-1]) / 2**20 for text in shown], unit="MiB", goal=None)


def main(as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    for part in (replica_process, answer, population_row, fitted_row):
        part().emit(as_json)


if __name__ == "__main__":
    typer.run(main)
