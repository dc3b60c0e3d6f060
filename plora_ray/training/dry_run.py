"""What a job would do and what it would hold in memory, said without doing it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from plora_ray.training.engine import choose_sharding
from plora_ray.training.memory import rows_bytes
from plora_ray.training.plan import Plan
from plora_ray.training.prepare import Prepared
from plora_ray.training.progress import ProgressLine
from plora_ray.training.waves import MiB


@dataclass(frozen=True)
class RankMemory:
    """Bytes of the largest rank of `ranks`: parameters of the model, rows of its partitions, the largest wave. Activations come on top."""

    ranks: int
    sharding: str
    parameters: int
    rows: int
    wave: int


@dataclass(frozen=True)
class DryRun:
    """The last line on standard output of a dry run."""

    plan: Plan
    memory: RankMemory
    store: str

    def to_json(self) -> str:
        values: dict[str, Any] = {"dry_run": True, **self.plan.to_json(), "memory": asdict(self.memory), "store": self.store}
        return json.dumps(values)


def dry_run_of(prepared: Prepared, ranks: int, line: ProgressLine) -> DryRun:
    """Say what `ranks` ranks would hold each; of a range, the fewest, which hold most."""
    settings = prepared.assignment.settings
    whole = prepared.size.parameter_bytes
    sharding = choose_sharding(settings.training.sharding, whole, settings.training.offload)
    held = -(-whole // ranks) if sharding == "zero3" else whole
    memory = RankMemory(ranks, sharding, held, rows_bytes(settings, prepared.stats.partitions, ranks), prepared.plan.largest_bytes)
    shown = ", ".join(
        f"{name} {value / MiB:,.1f} MiB" for name, value in asdict(memory).items() if isinstance(value, int) and name != "ranks"
    )
    line.say(f"on each of {ranks} ranks ({sharding}), at most: {shown}; activations of a batch come on top")
    line.say("dry run: nothing was trained; the same command without --dry-run goes on from here")
    return DryRun(prepared.plan, memory, prepared.store.uri)
