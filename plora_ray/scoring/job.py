"""A whole table over a Ray cluster: units of it to actors with an engine each, finished units noted, so that it can go on.

    _job.json            which rows and which generation these answers are of; written first
    part-*.parquet       the answers
    _done/{unit}.json    what became of a unit; written after its parts
    _scored.json         the whole, written last

Readers of parquet pass over names that begin with `_`. Ray Data stays in this file.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ValidationError

from plora_ray.config import Settings, parse_settings
from plora_ray.data.source_settings import ColumnMapping, SourceSettings
from plora_ray.data.sources import fingerprint, list_units
from plora_ray.data.units import ReadUnit
from plora_ray.errors import ConfigError, DataError, PloraError
from plora_ray.inference.opening import EngineBuilder, open_for_serving
from plora_ray.opening import open_store
from plora_ray.scoring.parts import UnitScored, score_unit
from plora_ray.store import ObjectStore
from plora_ray.store.object_errors import ObjectExists

JOB, SCORED = "_job.json", "_scored.json"

Noted = TypeVar("Noted", bound=BaseModel)
Progress = Callable[[int, int], None]  # units done, units in all


class Job(BaseModel):
    """What the answers in a folder are of."""

    fingerprint: str
    generation: str
    units: int


class Scored(BaseModel):
    """The finished whole. personal: rows that their user's own adapter answered; skipped: bad rows."""

    generation: str
    rows: int
    personal: int
    skipped: int
    output: str
    seconds: float


class _Result(BaseModel):
    unit: int
    scored: dict[str, int] | None = None
    error: str | None = None


def scoring_source(settings: Settings, location: str) -> SourceSettings:
    """The rows at `location`, with the columns, filter and options of `data:`, and without labels."""
    columns = settings.data.columns
    # Rows to be answered have no label: the text stands for it, so that the same readers and rules will do.
    mapping = ColumnMapping(user_id=columns.user_id, text=columns.text, label=columns.text, timestamp=None, split=None)
    return SourceSettings.model_validate({**settings.data.model_dump(), "source": location, "columns": mapping.model_dump()})


def score_table(settings: Settings, location: str, output: str, progress: Progress = lambda done, total: None) -> Scored:
    """Answer every row at `location` with the current generation, on the running Ray cluster, into the folder or URL `output`.

    The same call goes on where an earlier one stopped, with that one's generation. Raises ConfigError if `output` holds answers of
    other rows, DataError for rows or a source that can't be used, StoreError.
    """
    began = time.monotonic()
    source = scoring_source(settings, location)
    units = list_units(source)
    target = ObjectStore(output, settings.store.storage_options() if output.startswith("s3://") else None)
    job = _begin(settings, target, fingerprint(source, units), len(units))
    done = {number: UnitScored(**values) for number, values in _finished_units(target)}
    progress(len(done), len(units))
    open_units = [(number, unit) for number, unit in enumerate(units) if number not in done]
    for result in _run(settings, source, job.generation, target, open_units):
        if result.scored is None:
            raise DataError(result.error or f"unit {result.unit} could not be scored")
        done[result.unit] = UnitScored(**result.scored)
        progress(len(done), len(units))
    rows, personal, skipped = (sum(getattr(unit, name) for unit in done.values()) for name in ("rows", "personal", "skipped"))
    scored = Scored(
        generation=job.generation, rows=rows, personal=personal, skipped=skipped, output=target.uri,
        seconds=round(time.monotonic() - began, 3),
    )  # fmt: skip
    target.write(SCORED, scored.model_dump_json().encode())
    return scored


def cpus_needed(settings: Settings) -> int:
    """CPUs that a private cluster must count for all engines at once, however few the machine has."""
    return max(os.cpu_count() or 1, math.ceil(settings.serving.replica_range[1] * settings.serving.replica_cpus) + 1)


class Scorer:
    """One actor: an engine, opened once, and the units that come its way."""

    def __init__(self, settings: dict[str, Any], source: dict[str, Any], generation: str, output: ObjectStore) -> None:
        parsed = parse_settings(settings)
        serving = parsed.serving
        torch.set_num_threads(max(1, math.floor(serving.replica_cpus)))
        self._store = open_store(parsed.store)
        self._engine = EngineBuilder(serving).build(open_for_serving(self._store, generation, serving))
        self._source, self._output = SourceSettings.model_validate(source), output

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        results = [self._score(int(number), unit) for number, unit in zip(batch["number"], batch["unit"], strict=True)]
        return {"result": [result.model_dump_json() for result in results]}

    def _score(self, number: int, unit: str) -> _Result:
        try:
            self._engine.cache.evict(self._store.tombstones())  # a long job learns of erasures between units
            scored = asdict(score_unit(number, ReadUnit.model_validate_json(unit), self._source, self._engine, self._output))
            self._output.write(f"_done/{number:05d}.json", _Result(unit=number, scored=scored).model_dump_json().encode())
            return _Result(unit=number, scored=scored)
        except PloraError as error:
            return _Result(unit=number, error=str(error))


def _begin(settings: Settings, target: ObjectStore, rows: str, units: int) -> Job:
    """The job that `target` is of, or a new one of the current generation."""
    store = open_store(settings.store)
    job = Job(fingerprint=rows, generation=store.open_generation().generation, units=units)
    try:
        target.create(JOB, job.model_dump_json().encode())
        return job
    except ObjectExists:
        standing = _parsed(Job, target.read(JOB), target)
    if standing.fingerprint != rows:
        raise ConfigError(f"{target.uri} holds answers of other rows, or of the same rows before they changed: name a new directory")
    return standing


def _finished_units(target: ObjectStore) -> Iterator[tuple[int, dict[str, int]]]:
    for data in target.read_many(item.path for item in target.list("_done")).values():
        result = _parsed(_Result, data, target)
        if result.scored is not None:
            yield result.unit, result.scored


def _parsed(kind: type[Noted], data: bytes, target: ObjectStore) -> Noted:
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise ConfigError(f"{target.uri} holds a note that isn't of this command: name a new directory") from error


def _run(
    settings: Settings, source: SourceSettings, generation: str, target: ObjectStore, units: list[tuple[int, ReadUnit]]
) -> Iterator[_Result]:
    """Each unit's result, as they come."""
    if not units:
        return
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    serving = settings.serving
    with ray.data.DataContext.current(context):
        items = [{"number": number, "unit": unit.model_dump_json()} for number, unit in units]
        results = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            Scorer,
            fn_constructor_args=(settings.model_dump(mode="json"), source.model_dump(mode="json"), generation, target),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(serving.replica_range[1], len(items))),
            num_cpus=serving.replica_cpus,
            num_gpus=serving.replica_gpus or None,
        )
    for row in results.iter_rows():
        yield _Result.model_validate_json(str(row["result"]))
