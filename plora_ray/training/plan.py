"""The plan of a run: what happens to each user, in which waves, within which memory. Made before anything is trained.

Knows keys, counts and digests; reads no rows and touches no model. A plan depends on settings, data and store alone, never on
the machine, and is kept with the run: whoever resumes follows the same one.
"""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Set
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np
from safetensors.numpy import save

from plora_ray.data.trained_users import TrainedUsers
from plora_ray.errors import StoreError
from plora_ray.identity import as_words
from plora_ray.store.object_errors import ObjectExists
from plora_ray.store.objects import ObjectStore
from plora_ray.training.run_objects import read_arrays, read_json
from plora_ray.training.waves import MiB, Wave, WaveLimits, cut_waves, span_bytes


class Action(IntEnum):
    """What becomes of a user: a fit on its training rows, the base's record byte for byte, or its fresh adapter's."""

    FIT = 0
    CARRY = 1
    FOLD = 2


@dataclass(frozen=True)
class PartitionPlan:
    """One partition's users in key order.

    keys: uint8 [users, 16]. actions: uint8 [users]. rows: int32 [users] training rows of who is fitted, else 0. digests: uint8
    [users, 16] of the rows that the user's adapter comes from, zeros where nobody knows. folded_records: float32 [folded, width]
    and folded_examples: int32 [folded], of the users with Action.FOLD.
    """

    keys: np.ndarray
    actions: np.ndarray
    rows: np.ndarray
    digests: np.ndarray
    folded_records: np.ndarray
    folded_examples: np.ndarray

    @classmethod
    def fit_all(cls, users: TrainedUsers) -> PartitionPlan:
        """Everybody with training rows is fitted."""
        actions = np.full(len(users.keys), Action.FIT, np.uint8)
        return cls(users.keys, actions, users.rows, users.digests, np.empty((0, 0), np.float32), np.empty(0, np.int32))

    def fits(self, keys: np.ndarray) -> np.ndarray:
        """bool [users]: which of the users with these keys (uint8 [users, 16]) are fitted."""
        return np.isin(as_words(keys), as_words(self.keys[self.actions == Action.FIT]))

    def count(self, action: Action) -> int:
        return int((self.actions == action).sum())


@dataclass(frozen=True)
class Plan:
    """A whole run. base: the generation it starts from, if any. new: users to fit whom the base doesn't have.

    largest_users, largest_bytes: of the largest waves. without_digests: base users in the data whose earlier rows nobody knows.
    """

    base: str | None
    fitted: int
    new: int
    carried: int
    folded: int
    erased: int
    without_digests: int
    training_rows: int
    largest_users: int
    largest_bytes: int
    waves: list[Wave] = field(default_factory=list)

    @property
    def users(self) -> int:
        return self.fitted + self.carried + self.folded

    def describe(self) -> str:
        """One line for people."""
        what = f"{self.fitted:,} users to train, {self.training_rows:,} training rows"
        if self.carried or self.folded or self.without_digests:
            parts = [f"carry over {self.carried:,} users", f"refit {self.fitted:,} ({self.new:,} new) on {self.training_rows:,} rows"]
            what = ", ".join(parts + ([f"take in {self.folded:,} fresh adapters"] if self.folded else []))
        size = f" of up to {self.largest_users:,} users, up to {max(1, round(self.largest_bytes / MiB)):,} MiB each" if self.waves else ""
        return f"{what}, {len(self.waves):,} waves{size}"

    def to_json(self) -> dict[str, Any]:
        """Its numbers, without the waves themselves."""
        values = {name: value for name, value in asdict(self).items() if name != "waves"}
        return {**values, "users": self.users, "waves": len(self.waves)}


class PlanBuilder:
    """Adds up a plan partition by partition, so that one is in memory at a time."""

    def __init__(self, limits: WaveLimits) -> None:
        self._limits = limits
        self._waves: list[Wave] = []
        self._counts = dict.fromkeys(Action, 0)
        self._rows = self._largest_users = self._largest_bytes = 0

    def add(self, partition: int, plan: PartitionPlan) -> None:
        """Cut the next partition into waves; partitions come in ascending order."""
        fitted, total = np.cumsum([0, *(plan.rows > 0)]), np.cumsum([0, *plan.rows])
        for start, stop in cut_waves(plan.rows, self._limits):
            self._waves.append(Wave(len(self._waves), partition, start, stop))
            self._largest_users = max(self._largest_users, stop - start)
            self._largest_bytes = max(self._largest_bytes, span_bytes(fitted, total, start, stop, self._limits))
        self._rows += int(total[-1])
        for action in Action:
            self._counts[action] += plan.count(action)

    def build(self, base: str | None = None, *, new: int | None = None, erased: int = 0, without_digests: int = 0) -> Plan:
        """The plan of everything added. new: None if all are."""
        fitted = self._counts[Action.FIT]
        return Plan(
            base=base, fitted=fitted, new=fitted if new is None else new, carried=self._counts[Action.CARRY],
            folded=self._counts[Action.FOLD], erased=erased, without_digests=without_digests, training_rows=self._rows,
            largest_users=self._largest_users, largest_bytes=self._largest_bytes, waves=self._waves,
        )  # fmt: skip


class PlanFiles:
    """A run's plan in its folder: a draft's files, one a partition, and plan.json, which names the one draft that holds.

    Two jobs that plan the same run at once write drafts of their own; the first plan.json stands for both.
    """

    def __init__(self, objects: ObjectStore, folder: str) -> None:
        self._objects, self._folder = objects, f"{folder}/plan"
        self._draft = uuid.uuid4().hex
        self._fixed: dict[str, Any] | None = None

    def save_partition(self, partition: int, plan: PartitionPlan) -> None:
        """Add a partition to this object's draft."""
        arrays = {name: np.ascontiguousarray(values) for name, values in vars(plan).items()}
        self._objects.create(self._path(self._draft, partition), save(arrays))

    def save(self, plan: Plan, fresh_seen: np.ndarray) -> Plan:
        """Fix the plan, whose partitions are saved; returns the one that holds. fresh_seen: states of the fresh objects it knows of."""
        self._objects.create(f"{self._folder}/{self._draft}/fresh.safetensors", save({"seen": fresh_seen}))
        with contextlib.suppress(ObjectExists):
            self._objects.create(f"{self._folder}/plan.json", json.dumps({"draft": self._draft, **asdict(plan)}).encode())
        standing = self.load()
        assert standing is not None
        return standing

    def load(self) -> Plan | None:
        """The run's plan; None until it is whole."""
        path = f"{self._folder}/plan.json"
        if self._fixed is None:
            data = self._objects.read_many([path]).get(path)
            if data is None:
                return None
            self._fixed = read_json(data, self._objects.uri_of(path))
        values = {name: value for name, value in self._fixed.items() if name != "draft"}
        return Plan(**{**values, "waves": [Wave(**wave) for wave in values["waves"]]})

    def forget(self) -> None:
        """The plan no longer holds; its files may go one by one."""
        self._objects.delete(f"{self._folder}/plan.json")

    def load_partition(self, partition: int) -> PartitionPlan:
        """A partition of the plan that holds. Raises StoreError before there is one."""
        path = self._path(self._standing(), partition)
        return PartitionPlan(**read_arrays(self._objects.read(path), self._objects.uri_of(path)))

    def check_users(self, wave: Wave, users: int, erased: Set[bytes]) -> None:
        """Raises StoreError unless a wave of so many `users` holds all that were planned, except those of its own that are `erased`."""
        planned, gone = wave.stop - wave.start, 0
        if users != planned:
            keys = self.load_partition(wave.partition).keys[wave.start : wave.stop]
            gone = sum(key.tobytes() in erased for key in keys)
        if not planned - gone <= users <= planned:
            raise StoreError(f"wave {wave.index} holds {users} users, but {planned} were planned and {gone} erased: run the job again")

    def fresh_seen(self) -> np.ndarray:
        """The states of the fresh objects that the plan knows of. Raises StoreError before there is a plan."""
        path = f"{self._folder}/{self._standing()}/fresh.safetensors"
        return read_arrays(self._objects.read(path), self._objects.uri_of(path))["seen"]

    def _standing(self) -> str:
        if self.load() is None or self._fixed is None:
            raise StoreError(f"{self._objects.uri_of(self._folder)} has no whole plan: run the job again")
        return str(self._fixed["draft"])

    def _path(self, draft: str, partition: int) -> str:
        return f"{self._folder}/{draft}/{partition:05d}.safetensors"
