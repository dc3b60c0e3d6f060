"""A generation made from the one before: who is fitted again, and how everybody else gets into the new segments unchanged.

Shared parameters, prior and head are the base's, byte for byte; so its adapters, fresh ones included, fit the new generation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from plora_ray.adapters.labels import LabelSpace
from plora_ray.config import Settings
from plora_ray.data.stats import PartitionStats
from plora_ray.data.trained_users import TrainedUsers
from plora_ray.errors import DataError, StoreError
from plora_ray.identity import KEY_BYTES, partition_of
from plora_ray.store import AdapterStore, GenerationReader, UserAdapter
from plora_ray.store.folding import FreshSnapshot, fresh_adapters
from plora_ray.store.row_digests import read_row_digests
from plora_ray.training.plan import Action, PartitionPlan, Plan, PlanBuilder
from plora_ray.training.waves import WaveLimits

Value = TypeVar("Value")

UNKNOWN = bytes(KEY_BYTES)
ANEW = "train a new population (without --only-users-with-new-data and with training.warm_start false)"


@dataclass(frozen=True)
class Base:
    """The generation a run starts from."""

    reader: GenerationReader
    labels: LabelSpace

    @classmethod
    def open(cls, store: AdapterStore, settings: Settings, weight_hash: str, generation: str | None = None) -> Base:
        """This or the current generation. Raises StoreError if there is none, or if it was trained as these settings can't go on."""
        if generation is None and store.current() is None:
            raise StoreError(f"{store.uri} has no generation to start from: {ANEW}")
        reader = store.open_generation(generation)
        config, manifest = reader.manifest.adapter_config, reader.manifest
        labels = LabelSpace.from_json(config["labels"])
        had = {
            **config["spec"],
            "max_length": config["max_length"],
            "kind": manifest.kind,
            "weights of the model": manifest.model.weight_hash,
        }
        spec = settings.adapter_spec(labels.outputs).to_json()
        want = {**spec, "max_length": settings.model.max_length, "weights of the model": weight_hash}
        for name in sorted((set(had) | set(want)) - {"model"}):  # another path to the same weights is the same model
            before, now = had.get(name), want.get(name)
            if (list(before) if isinstance(before, tuple) else before) != (list(now) if isinstance(now, tuple) else now):
                shown = "" if "weights" in name else f" ({before!r} then, {now!r} now)"
                raise StoreError(f"generation {manifest.generation} was trained with another {name}{shown}: set it back or {ANEW}")
        return cls(reader, labels)

    def refuse_new_labels(self, stats: PartitionStats) -> None:
        """Raises DataError if a row has a class that the base doesn't know."""
        if self.labels.task == "classification":
            new = sorted({name for counts in stats.label_counts.values() for name in counts} - set(self.labels.classes))
            if new:
                listed = ", ".join(repr(name) for name in new[:20])
                raise DataError(f"the classes {listed} are new to generation {self.reader.generation}: remove their rows or {ANEW}")


def plan_new_data(
    store: AdapterStore, base: Base, trained_users: Callable[[int], TrainedUsers], partitions: int, limits: WaveLimits,
    save: Callable[[int, PartitionPlan], None], unused: Set[bytes] = frozenset(),
) -> tuple[Plan, FreshSnapshot]:  # fmt: skip
    """Plan a generation in which only users with new or changed rows are fitted; also the fresh objects that were looked at.

    trained_users: reads who has training rows in a partition. save: is handed each partition's plan. Erased users are left out, and
    `unused` ones unless they have new rows.
    """
    erased = store.tombstones().keys()
    snapshot = FreshSnapshot.take(store.objects)
    manifest = base.reader.manifest
    builder, new, left_out, unknown = PlanBuilder(limits), 0, 0, 0
    parts = zip(
        _by_partition(((key, None) for key in base.reader.keys() if key not in unused), partitions),  # noqa: SIM118
        _by_partition(_pairs(*read_row_digests(store.objects, manifest.generation)), partitions),
        _by_partition(((key, None) for key in snapshot.keys if key not in erased and key not in unused), partitions),
        strict=True,
    )
    for partition, (had, digests, fresh) in enumerate(parts):
        source = trained_users(partition)
        rows = dict(_pairs(source.keys, source.digests))
        folded = {
            adapter.key: adapter
            for adapter in fresh_adapters(store, list(fresh), base.reader.basis)
            if adapter.key not in had or adapter.version > manifest.version
        }
        wanted = {key for key, digest in rows.items() if key not in had or digests.get(key) != digest} - erased
        users = sorted(wanted | had.keys() | folded.keys())
        counts = dict(zip(rows, source.rows.tolist(), strict=True))
        plan = _partition_plan(users, {key: counts[key] for key in wanted}, {**digests, **rows}, folded)
        save(partition, plan)
        builder.add(partition, plan)
        new += len(wanted - had.keys())
        left_out += len(rows.keys() & erased)
        unknown += len((wanted & had.keys()) - digests.keys())
    return builder.build(manifest.generation, new=new, erased=left_out, without_digests=unknown), snapshot


def _partition_plan(
    users: list[bytes], wanted: dict[bytes, int], digests: dict[bytes, bytes], folded: dict[bytes, UserAdapter]
) -> PartitionPlan:
    """wanted: training rows of the users to fit. digests: of users' rows, where known."""
    taken = [folded[key] for key in users if key in folded and key not in wanted]
    actions = [Action.FIT if key in wanted else Action.FOLD if key in folded else Action.CARRY for key in users]
    return PartitionPlan(
        keys=_as_rows(users),
        actions=np.array(actions, np.uint8),
        rows=np.array([wanted.get(key, 0) for key in users], np.int32),
        digests=_as_rows([digests.get(key, UNKNOWN) for key in users]),
        folded_records=np.stack([adapter.record for adapter in taken]) if taken else np.empty((0, 0), np.float32),
        folded_examples=np.array([adapter.examples for adapter in taken], np.int32),
    )


def _by_partition(items: Iterable[tuple[bytes, Value]], partitions: int) -> Iterator[dict[bytes, Value]]:
    """Items in ascending order of their keys as one dictionary a partition, one at a time."""
    iterator = iter(items)
    waiting = next(iterator, None)
    for partition in range(partitions):
        found: dict[bytes, Value] = {}
        while waiting is not None and partition_of(waiting[0], partitions) == partition:
            found[waiting[0]] = waiting[1]
            waiting = next(iterator, None)
        yield found


def _pairs(keys: np.ndarray, values: np.ndarray) -> Iterator[tuple[bytes, bytes]]:
    return ((key.tobytes(), value.tobytes()) for key, value in zip(keys, values, strict=True))


def _as_rows(items: list[bytes]) -> np.ndarray:
    """uint8 [items, 16]."""
    return np.frombuffer(b"".join(items), np.uint8).reshape(-1, KEY_BYTES)
