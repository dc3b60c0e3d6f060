"""What encryption costs: publishing, cold users and bulk reads, with and without it, in turn.

    python -m benchmarks.store_encryption [--users 100000] [--rounds 3] [--json]

Both stores are folders (file://) with the same made-up users, so that all of the difference is ours. The publishing of a generation
whose users have data keys already (every later one) is measured beside the first, which makes them.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.figures import seconds, spread
from benchmarks.store import PLORA_WIDTH, Population
from plora_ray.store import AdapterStore, ModelRef, RootKeySource

COLD_PULLS = 500
BULK_USERS = 1000


def publish(store: AdapterStore, people: Population, generation: str) -> None:
    """All waves, then the manifest."""
    writer = store.begin(generation)
    writer.write_shared({"B": np.ones((4, 4), np.float32)}, {})
    segments = {
        wave: writer.write_segment(wave, keys, records, np.full(len(keys), 16, np.int32))
        for wave, (keys, records) in enumerate(people.waves())
    }
    model = ModelRef(name="m", weight_hash="0")
    writer.commit(expected_users=people.users, model=model, adapter_config={}, segments=segments)


def main(
    users: Annotated[int, typer.Option(help="Users with vectors of 64 numbers.")] = 100_000,
    rounds: Annotated[int, typer.Option(help="New stores of each kind.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Measure and print."""
    os.environ["BENCHMARK_ROOT_KEY"] = os.urandom(32).hex()
    kinds: dict[str, RootKeySource | None] = {"plain": None, "encrypted": RootKeySource(key_env="BENCHMARK_ROOT_KEY")}
    people = Population(users, PLORA_WIDTH)
    taken: dict[tuple[str, str], list[float]] = {}
    for turn in range(rounds):
        for kind, root_key in kinds.items() if turn % 2 else reversed(kinds.items()):
            with tempfile.TemporaryDirectory(prefix="plora-encryption-") as folder:
                for name, values in measured(Path(folder), people, root_key, turn).items():
                    taken.setdefault((name, kind), []).extend(values)
    units = {"publish_first": "s", "publish_later": "s", "cold_pull": "ms", "bulk_pull_of_1000": "s", "stored_per_user": "bytes"}
    for name, unit in units.items():
        for kind in kinds:
            spread(f"encryption.{name}_{kind}", taken[name, kind], unit=unit, goal=None).emit(as_json)


def measured(folder: Path, people: Population, root_key: RootKeySource | None, seed: int) -> dict[str, list[float]]:
    """The figures of one new store."""
    store = AdapterStore(str(folder), encryption=root_key)
    first = seconds(lambda: publish(store, people, "g1"))
    later = seconds(lambda: publish(store, people, "g2"))
    again: Any = AdapterStore(str(folder), encryption=root_key)
    reader = again.open_generation()
    cold = [1000 * seconds(lambda key=key: again.pull(reader, key)) for key in people.some(COLD_PULLS, seed)]
    bulk = seconds(lambda: reader.get_many(people.some(BULK_USERS, 1000 + seed)))
    size = sum(item.size for item in again.objects.list("generations/g2") + again.objects.list("keys")) / people.users
    return {"publish_first": [first], "publish_later": [later], "cold_pull": cold, "bulk_pull_of_1000": [bulk], "stored_per_user": [size]}


if __name__ == "__main__":
    typer.run(main)
