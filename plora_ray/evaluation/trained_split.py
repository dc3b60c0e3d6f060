"""Whether rows are divided as they were in training: otherwise rows that a generation has learnt would be test rows."""

from __future__ import annotations

import json
from typing import Any

from plora_ray.data.source_settings import SourceSettings
from plora_ray.errors import ConfigError, StoreError
from plora_ray.store import AdapterStore

DIVIDING = ("split_seed", "validation_fraction", "test_fraction")


def check_split(store: AdapterStore, generation: str, data: SourceSettings) -> None:
    """Raises ConfigError if `data` may call a row a test row that the job which published `generation` didn't.

    Only for a source that doesn't say itself which rows are test rows. A generation without a report isn't judged.
    """
    try:
        report = json.loads(store.objects.read(f"generations/{generation}/report.json"))
        trained = SourceSettings.model_validate({**report["settings"]["data"], "source": data.source, "filter": {}})
    except (StoreError, ValueError, KeyError, TypeError):
        return
    wrong = _first_difference(trained, data)
    if wrong is not None:
        name, given, learnt = wrong
        raise ConfigError(
            f"data.{name} is {given}, but generation {generation} was trained with {learnt}: rows that it has learnt would be test rows; "
            f"set data.{name} to {learnt}, or name a split column"
        )


def _first_difference(trained: SourceSettings, data: SourceSettings) -> tuple[str, Any, Any] | None:
    """The setting, its value now and in training."""
    now, then = data.split_times, trained.split_times
    if now is not None and then is not None:
        return ("split_times.test", now.test.isoformat(), then.test.isoformat()) if now.test < then.test else None
    if (now is None) != (then is None):
        return "split_times", now and now.model_dump(mode="json"), then and then.model_dump(mode="json")
    different = [name for name in DIVIDING if getattr(data, name) != getattr(trained, name)]
    return (different[0], getattr(data, different[0]), getattr(trained, different[0])) if different else None
