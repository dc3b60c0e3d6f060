"""The run's own history: a thinned curve of samples and every start of its workers, in the run's folder of the store.

One small object, written whole, so that a job started again draws its report from the first step on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from plora_ray.store import ObjectStore
from plora_ray.training.telemetry.sample import Sample

MOST_SAMPLES = 2000
SAVE_EVERY_S = 30.0
WRITE_RETRY_S = 3.0


@dataclass(frozen=True)
class Start:
    """A group of workers that began `seconds` into the training. resumed: by a newly started job, not within one."""

    seconds: float
    resumed: bool
    sharding: str
    parameter_bytes: int
    parameter_bytes_held: list[int]


class History:
    """jobs: how often the job was started. samples: in the order of time; steps that were trained again count once.

    The driver writes it itself: publishing reads it, and nothing may come into the run's folder once that is deleted.
    """

    def __init__(self, objects: ObjectStore, folder: str) -> None:
        # What fails to be written now is written with the next sample, so nobody waits for it as long as for a result.
        self._objects = ObjectStore(objects.uri, objects.storage_options, retry_s=min(objects.retry_s, WRITE_RETRY_S))
        self._path = f"{folder}/history.json"
        self._saved_s = time.monotonic()
        self.jobs = 0
        self.samples: list[Sample] = []
        self.starts: list[Start] = []
        data = objects.read_many([self._path]).get(self._path)
        if data is not None:
            self._load(json.loads(data))

    @property
    def seconds(self) -> float:
        """Of training, over all starts."""
        return self.samples[-1].seconds if self.samples else 0.0

    @property
    def rows(self) -> int:
        """Gone through, over all starts; rows of an epoch that was begun twice count twice."""
        return self.samples[-1].rows if self.samples else 0

    @property
    def restarts(self) -> int:
        """How often workers were started after the first time: by a job started again, after a failure, or for a resize."""
        return max(0, self.jobs - 1) + sum(not start.resumed for start in self.starts[1:])

    def job_began(self) -> None:
        """The job starts, for the first time or again."""
        self.jobs += 1
        self.save()

    def began(self, start: Start) -> None:
        """A group of workers stands."""
        self.starts.append(start)
        self.save()

    def write(self, samples: Sequence[Sample]) -> None:
        """Add samples; saved now and then."""
        for sample in samples:
            if sample.step is not None:
                while self.samples and (self.samples[-1].step or 0) >= sample.step:
                    self.samples.pop()  # trained again from the last checkpoint
            self.samples.append(sample)
        while len(self.samples) > MOST_SAMPLES:
            self.samples = [*self.samples[:-1:2], self.samples[-1]]
        if time.monotonic() - self._saved_s > SAVE_EVERY_S:
            self.save()

    def save(self) -> None:
        """Write everything."""
        self._saved_s = time.monotonic()
        self._objects.write(self._path, json.dumps(self.to_json()).encode())

    def to_json(self) -> dict[str, Any]:
        """Samples by column, starts by row."""
        columns = {column.name: [getattr(sample, column.name) for sample in self.samples] for column in fields(Sample)}
        return {"jobs": self.jobs, "samples": columns, "starts": [asdict(start) for start in self.starts]}

    def _load(self, values: dict[str, Any]) -> None:
        self.jobs, columns = values["jobs"], values["samples"]
        self.samples = [Sample(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]
        self.starts = [Start(**start) for start in values["starts"]]
