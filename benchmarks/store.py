"""The adapter store at a million users, beside an object a user and a Lance dataset.

    python -m benchmarks.store [--quick] [--json] [--users 1000000] [--lora-users 10000] [--lora-width 36864] [--where file,s3]

Each store is published to a folder and to a local S3 server over HTTP, opened anew, and asked for users at random whom it
hasn't read before. The rivals are asked in turn with ours. Lance takes part if its package (pylance) is installed; over S3 it is only
published to. The figures that have goals come last: the worse of the two places, with both as its spread.
"""

from __future__ import annotations

import importlib.util
import resource
import tempfile
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.figures import Figure, seconds, spread
from benchmarks.store_rivals import LanceDataset, ObjectPerUser, Rival, Waves
from cluster.s3_server import S3Server
from plora_ray.store import AdapterStore, ModelRef

PLORA_WIDTH = 64
LORA_WIDTH = 36_864  # rank 4 on query and value of six layers of 384
WAVE_USERS = 5000
LORA_WAVE_USERS = 400
BULK_USERS = 1000
GOALS = {  # figure: unit, goal
    "open_million_s": ("s", 2.0), "index_bytes_per_user": ("bytes", 40.0), "cold_pull_requests": ("requests", 2.0),
    "publish_vs_object_per_user": ("ratio", 20.0),
}  # fmt: skip


@dataclass
class Population:
    """Made-up users, the same whenever they are gone through. keys: uint8 [users, 16] ascending."""

    users: int
    width: int
    wave_users: int = WAVE_USERS
    keys: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        drawn = np.random.default_rng(0).integers(0, 256, (self.users, 16), dtype=np.uint8)
        self.keys = drawn[np.lexsort(drawn[:, ::-1].T)]

    def waves(self, users: int | None = None) -> Waves:
        """Users in the order of their keys, a wave at a time."""
        for start in range(0, users or self.users, self.wave_users):
            keys = self.keys[start : min(start + self.wave_users, users or self.users)]
            yield keys, np.random.default_rng(start).standard_normal((len(keys), self.width), dtype=np.float32)

    def some(self, count: int, seed: int, users: int | None = None) -> list[bytes]:
        """Keys of users drawn at random."""
        drawn = np.random.default_rng(seed).choice(users or self.users, count, replace=False)
        return [self.keys[place].tobytes() for place in drawn]


class Ours:
    """The adapter store as a server uses it: `pull` asks for a fresh adapter as well. requests: reads since it was opened."""

    def __init__(self, uri: str, storage_options: dict[str, Any], kind: str = "plora") -> None:
        self._uri, self._options, self._kind = uri, storage_options, kind
        self.requests = 0

    def publish(self, waves: Waves) -> None:
        writer = AdapterStore(self._uri, self._options).begin("g1", self._kind)
        writer.write_shared({"B": np.ones((4, 4), np.float32)}, {})
        segments = {
            wave: writer.write_segment(wave, keys, records, np.full(len(keys), 16, np.int32)) for wave, (keys, records) in enumerate(waves)
        }
        users = sum(segment.users for segment in segments.values())
        writer.commit(expected_users=users, model=ModelRef(name="m", weight_hash="0"), adapter_config={}, segments=segments)

    def open(self) -> None:
        self.store = AdapterStore(self._uri, self._options)
        self.reader = self.store.open_generation()
        backend: Any = self.store.objects._backend
        read = backend.read

        def counted(*arguments: Any) -> bytes:
            self.requests += 1
            return bytes(read(*arguments))

        backend.read = counted
        self.requests = 0

    def pull(self, key: bytes) -> np.ndarray:
        adapter = self.store.pull(self.reader, key)
        assert adapter is not None
        return adapter.record

    def pull_many(self, keys: list[bytes]) -> int:
        return len(self.reader.get_many(keys))

    def objects(self) -> int:
        return len(self.store.objects.list())


def main(
    users: Annotated[int, typer.Option(help="Users with vectors of 64 numbers.")] = 1_000_000,
    lora_users: Annotated[int, typer.Option(help="Users with private matrices.")] = 10_000,
    lora_width: Annotated[int, typer.Option(help="Numbers of a user's matrices; 36,864 are 144 KiB.")] = LORA_WIDTH,
    where: Annotated[str, typer.Option(help="file, s3, or both, separated by a comma.")] = "file,s3",
    with_rivals: Annotated[bool, typer.Option("--rivals/--no-rivals", help="Measure the others, too.")] = True,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer users with private matrices, fewer pulls.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Measure and print."""
    lora_users, rounds = (lora_users // 10, 50) if quick else (lora_users, 300)
    found: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="plora-store-") as folder, S3Server(Path(folder, "s3")) as server:
        places = {"file": (f"file://{folder}/files", {}), "s3": (server.create_bucket("bench"), server.storage_options)}
        for name in where.split(","):
            report = Report(name, as_json)
            if users:
                found.append(measure(report, Population(users, PLORA_WIDTH), *places[name], with_rivals, rounds))
            if lora_users:
                measure_lora(report, Population(lora_users, lora_width, LORA_WAVE_USERS), *places[name])
    for figure, (unit, goal) in GOALS.items():
        values = [values[figure] for values in found if figure in values]
        if values and (figure != "open_million_s" or users == 1_000_000):
            worst = min(values) if figure == "publish_vs_object_per_user" else max(values)
            Figure(figure, round(worst, 4), round(min(values), 4), round(max(values), 4), unit, goal).emit(as_json)


@dataclass(frozen=True)
class Report:
    """Prints figures of one kind of storage."""

    where: str
    as_json: bool

    def one(self, name: str, value: float, unit: str, goal: float | None = None) -> None:
        """A figure that was measured once."""
        Figure(f"{self.where}.{name}", *[round(value, 4)] * 3, unit, goal).emit(self.as_json)

    def pulls(self, name: str, taken_s: list[float]) -> None:
        """Median, 99th percentile, and from the 10th to the 90th, in milliseconds."""
        spread(f"{self.where}.{name}_p50", [1000 * value for value in taken_s], unit="ms", goal=None).emit(self.as_json)
        self.one(f"{name}_p99", float(np.percentile(taken_s, 99)) * 1000, "ms")


def measure(
    report: Report, people: Population, place: str, options: dict[str, Any], with_rivals: bool, rounds: int
) -> dict[str, float]:
    """Ours at full size, the rivals beside it; an object a user for so many users as take seconds, its publishing scaled up.

    Returns the figures that have goals.
    """
    ours = Ours(f"{place}/ours-{uuid.uuid4().hex[:8]}", options)
    few = min(people.users, 2000)
    rivals: dict[str, tuple[Rival, int]] = {"object_per_user": (ObjectPerUser(f"{place}/each", options), few)} if with_rivals else {}
    if with_rivals and importlib.util.find_spec("lance"):
        rivals["lance"] = (LanceDataset(f"{place}/lance", options), people.users)
    figures = {}
    published = seconds(lambda: ours.publish(people.waves()))
    report.one("publish", published, "s")
    for name, (rival, count) in rivals.items():
        taken = seconds(lambda rival=rival, count=count: rival.publish(people.waves(count))) * people.users / count
        report.one(f"publish_{name}", taken, "s")
        figures[f"publish_vs_{name}"] = taken / published
        report.one(f"publish_vs_{name}", taken / published, "ratio")
    before = _resident()
    figures["open_million_s"] = seconds(ours.open)
    figures["index_bytes_per_user"] = ours.reader.index_bytes / people.users
    report.one("open", figures["open_million_s"], "s")
    report.one("resident_per_user", (_resident() - before) / people.users, "bytes")
    report.one("index_bytes_per_user", figures["index_bytes_per_user"], "bytes")
    report.one("objects", ours.objects(), "objects")
    size = sum(item.size for item in ours.store.objects.list()) / people.users
    report.one("stored_per_user", size, "bytes")
    wanted = people.some(min(100_000, people.users), 1)
    report.one("lookups", len(wanted) / seconds(lambda: [ours.reader.lookup(key) for key in wanted]), "1/s")
    if report.where == "s3":
        rivals.pop("lance", None)  # the local server reads a whole object for any range of it: one file of all users would pay for that
    figures["cold_pull_requests"] = cold(report, people, ours, rivals, rounds)
    return figures


def cold(report: Report, people: Population, ours: Ours, rivals: dict[str, tuple[Rival, int]], rounds: int) -> float:
    """Single users and a thousand at once, ours and the rivals in turn; our requests a single user."""
    sides: dict[str, tuple[Rival, int]] = {"ours": (ours, people.users), **rivals}
    for name, (rival, _) in rivals.items():
        report.one(f"open_{name}", seconds(rival.open), "s")
    taken: dict[str, list[float]] = {name: [] for name in sides}
    ours.requests = 0
    for turn in range(rounds):
        for name, (side, count) in sides.items():
            key = people.some(1, turn, count)[0]
            taken[name].append(seconds(lambda side=side, key=key: side.pull(key)))
    requests = ours.requests / rounds
    report.one("cold_pull_requests", requests, "requests")
    for name, values in taken.items():
        report.pulls(f"cold_pull_{name}", values)
    bulk: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(5):
        for name, (side, count) in sides.items():
            keys = people.some(min(BULK_USERS, count), 1000 + turn, count)
            bulk[name].append(seconds(lambda side=side, keys=keys: _all_of(side.pull_many(keys), len(keys))))
    for name, values in bulk.items():
        spread(f"{report.where}.bulk_pull_of_{BULK_USERS}_{name}", values, unit="s", goal=None).emit(report.as_json)
    return requests


def measure_lora(report: Report, people: Population, place: str, options: dict[str, Any]) -> None:
    """Private matrices: the same store with large records, their making included in the time to publish."""
    ours = Ours(f"{place}/lora-{uuid.uuid4().hex[:8]}", options, "lora")
    report.one("lora_publish", seconds(lambda: ours.publish(people.waves())), "s")
    report.one("lora_open", seconds(ours.open), "s")
    report.one("lora_objects", ours.objects(), "objects")
    report.pulls("lora_cold_pull", [seconds(lambda key=key: ours.pull(key)) for key in people.some(min(200, people.users), 3)])


def _resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _all_of(found: int, wanted: int) -> None:
    assert found == wanted, f"{found} of {wanted} users were found"


if __name__ == "__main__":
    typer.run(main)
