"""A run: one training job from its first start to its published generation, over any number of restarts.

Its folder in the store is named by a fingerprint of the data and of the settings that shape the result, so the same
command finds its unfinished work again. It holds tokens and results of users' texts and is deleted once the generation
is published.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from safetensors.numpy import save as save_arrays
from safetensors.torch import load, save

from plora_ray.adapters.calibration import Calibration
from plora_ray.adapters.fit import UserPrior
from plora_ray.config import Settings
from plora_ray.store.objects import ObjectStore
from plora_ray.training.plan import PlanFiles
from plora_ray.training.run_objects import read_arrays, read_json

RUNS = "runs"
_CALIBRATION = "calibration.json"
WAVES_AT_ONCE = 4  # outcomes read at the same time when the report is made; bounds memory
# What may change between two starts of the same run: it shapes how the work is done, not what comes out.
_FREE_SETTINGS = {
    "num_workers", "resize_check_s", "use_gpu", "sharding", "max_failures", "store_retry_s", "tensorboard_dir", "mlflow", "offload",
    "offload_dir", "gradient_checkpointing", "deepspeed_profile", "activation_cache_mb", "activation_disk_mb", "activate",
}  # fmt: skip


@dataclass(frozen=True)
class RunHead:
    """run.json. generation: that the run makes. base: that it starts from, if any. Unix times of its begin and last sign of life."""

    generation: str
    base: str | None
    begun_at: float
    seen_at: float

    @classmethod
    def parse(cls, data: bytes) -> RunHead:
        """Raises CorruptObjectError."""
        return cls(**read_json(data, "run.json"))

    def dump(self) -> bytes:
        return json.dumps(asdict(self)).encode()


@dataclass(frozen=True)
class WaveOutcome:
    """What one wave did, for the report; rows are the test rows of its users, users are places in the wave.

    examples: [users] training rows. row_users: [rows]. labels: [rows] encoded. population, personal: [rows, outputs]
    logits without and with the user. label_counts: [users, outputs] training labels (for a regression their sum).
    remaining: [users] share of the prior's variance that the user's rows left, NaN where the solver gives none.
    guarded: [users] bool, whose fit would have harmed them, so that they are answered by the population.
    copied: [copied users] training rows of the wave's users that came over unchanged; they are not among `users`.
    """

    examples: np.ndarray
    row_users: np.ndarray
    labels: np.ndarray
    population: np.ndarray
    personal: np.ndarray
    label_counts: np.ndarray
    remaining: np.ndarray
    guarded: np.ndarray
    copied: np.ndarray

    @property
    def users(self) -> int:
        """In the wave's segment: fitted and copied."""
        return len(self.examples) + len(self.copied)


def run_fingerprint(settings: Settings, data_fingerprint: str, weight_hash: str, base: str | None = None) -> str:
    """32 hex digits that change with anything that changes what training makes. base: the generation whose users are carried over.

    A run that only starts from a generation's parameters isn't another one because a newer generation serves by now.
    """
    shaping: dict[str, Any] = settings.model_dump(mode="json", include={"task", "model", "adapter", "training"})
    for name in _FREE_SETTINGS:
        del shaping["training"][name]
    text = json.dumps([shaping, data_fingerprint, weight_hash, base], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def new_generation_id() -> str:
    """An id that sorts by time: g-20260131T093000-1a2b3c."""
    return f"g-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"


class RunState:
    """The run's folder. Every object in it is written whole. plan: where its plan lies."""

    def __init__(self, objects: ObjectStore, fingerprint: str) -> None:
        self._objects = objects
        self.folder = f"{RUNS}/{fingerprint}"
        self.plan = PlanFiles(objects, self.folder)
        self._head = f"{self.folder}/run.json"

    def head(self) -> RunHead | None:
        """What was fixed when the run was begun; None before that."""
        data = self._objects.read_many([self._head]).get(self._head)
        return None if data is None else RunHead.parse(data)

    def begin(self, base: str | None = None) -> tuple[RunHead, bool]:
        """The run's head, and whether the run was begun before. Generation and base are fixed by whoever comes first."""
        mine = RunHead(new_generation_id(), base, time.time(), time.time()).dump()
        standing = self._objects.update(self._head, lambda data: None if data else mine) or mine
        return RunHead.parse(standing), standing != mine

    def beat(self) -> None:
        """A sign of life, so that no garbage collection takes the run for abandoned; nothing for a run that is over."""
        self._objects.update(self._head, lambda data: replace(RunHead.parse(data), seen_at=time.time()).dump() if data else None)

    def save_prior(self, prior: UserPrior) -> None:
        """Keep the calibrated prior: all waves of a run are fitted under one."""
        self._objects.write(f"{self.folder}/prior.safetensors", save(prior.tensors()))

    def load_prior(self) -> UserPrior | None:
        """The kept prior, or None before it was calibrated."""
        path = f"{self.folder}/prior.safetensors"
        data = self._objects.read_many([path]).get(path)
        return None if data is None else UserPrior.from_tensors(load(data))

    def save_calibration(self, calibration: Calibration) -> None:
        """Keep how logits are calibrated, which all that follows depends on."""
        self._objects.write(f"{self.folder}/{_CALIBRATION}", json.dumps(asdict(calibration)).encode())

    def load_calibration(self) -> Calibration | None:
        """The kept calibration, or None before it was found. Raises CorruptObjectError."""
        path = f"{self.folder}/{_CALIBRATION}"
        data = self._objects.read_many([path]).get(path)
        if data is None:
            return None
        values = read_json(data, _CALIBRATION)
        return Calibration(values["scale"], tuple(values["base"]))

    def save_wave(self, wave: int, outcome: WaveOutcome, segment: str | None) -> None:
        """Keep the outcome that belongs to the segment with SHA-256 `segment`; None: the wave's users are gone and it has none.

        Two workers may fit one wave, one of them given up for dead: each keeps its own outcome, and the first segment decides.
        """
        arrays = {name: np.ascontiguousarray(values) for name, values in vars(outcome).items()}
        self._objects.write(self._wave_path(wave, segment), save_arrays(arrays))

    def load_waves(self, segments: Mapping[int, str | None]) -> Iterator[tuple[int, WaveOutcome]]:
        """The outcomes kept for these waves' segments, in that order, a few in memory at a time."""
        waves = iter(segments.items())
        while some := dict(islice(waves, WAVES_AT_ONCE)):
            paths = {self._wave_path(wave, segment): wave for wave, segment in some.items()}
            for path, data in self._objects.read_many(paths).items():
                yield paths[path], WaveOutcome(**read_arrays(data, self._objects.uri_of(path)))

    def delete(self) -> None:
        """Drop the whole folder: the plan first, so that none is half there, and run.json last, so that the run is still recognised."""
        self.plan.forget()
        self._objects.delete_folder(self.folder, last=self._head)

    def _wave_path(self, wave: int, segment: str | None) -> str:
        return f"{self.folder}/waves/{wave:05d}-{'empty' if segment is None else segment[:32]}.safetensors"
