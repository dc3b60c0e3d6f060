"""Whether rows are divided as they were in training: otherwise rows that a generation has learnt would be test rows."""

from __future__ import annotations

import json

from plora_ray.data.source_settings import SourceSettings
from plora_ray.errors import ConfigError, StoreError
from plora_ray.store import AdapterStore


def check_split(store: AdapterStore, generation: str, data: SourceSettings) -> None:
    """Raises ConfigError if `data` may call a row a test row that the job which published `generation` didn't.

    Only for a source that doesn't say itself which rows are test rows. A generation without a report, or with one of before reports told
    how rows were divided, isn't judged.
    """
    try:
        report = json.loads(store.objects.read(f"generations/{generation}/report.json"))
        column = report["split_column"]
        trained = SourceSettings.model_validate({**report["settings"]["data"], "source": data.source, "filter": {}})
    except (StoreError, ValueError, KeyError, TypeError):
        return
    wrong = _difference(data, trained, column and trained.split_times is None)
    if wrong is not None:
        raise ConfigError(f"test rows must be rows that generation {generation} hasn't learnt, but {wrong}, or name a split column")


def _difference(data: SourceSettings, trained: SourceSettings, by_column: bool) -> str | None:
    """What makes other rows test rows than in training, and what to change."""
    now, then = data.split_times, trained.split_times
    if by_column:
        return "it was trained by a split column and these rows are divided otherwise: give them that column (data.columns.split)"
    if then is not None:
        if now is None:
            return f"its rows were divided by time: set data.split_times.test to {then.test.isoformat()}"
        early = now.test < then.test
        return f"data.split_times.test is {now.test.isoformat()}: set it to {then.test.isoformat()} or later" if early else None
    if now is not None:
        return "its rows were divided by their texts: leave data.split_times out"
    if data.split_seed != trained.split_seed:
        return f"data.split_seed is {data.split_seed}: set it to {trained.split_seed}"
    if data.test_fraction > trained.test_fraction:
        return f"data.test_fraction is {data.test_fraction}: set it to {trained.test_fraction} or less"
    return None
