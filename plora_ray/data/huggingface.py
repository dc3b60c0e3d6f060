"""Hugging Face datasets as a source: names, splits, shards and their records.

The one file that knows the `datasets` library. Datasets are streamed, so nothing is downloaded to the driver's disk that a
task on another machine would miss.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from plora_ray.data.formats import ROWS_PER_CHUNK, Records
from plora_ray.data.rows import SPLIT_ALIASES
from plora_ray.data.units import ReadUnit
from plora_ray.errors import DataError

if TYPE_CHECKING:
    from datasets import IterableDataset  # type: ignore[import-untyped]


@dataclass(frozen=True, slots=True)
class HuggingFaceName:
    """`hf://NAME[:CONFIG][/SPLIT]`; NAME is a hub name (`imdb`, `org/name`) or a folder on disk."""

    name: str
    config: str | None
    split: str | None

    @classmethod
    def from_url(cls, url: str) -> HuggingFaceName:
        """Parse the URL. Raises DataError if it names nothing.

        Without a config, the last part is a split if it has a split's usual name or follows a folder or an `org/name`.
        """
        rest = url.removeprefix("hf://").rstrip("/")
        if not rest:
            raise DataError(f"{url!r} names no dataset: write hf://NAME, hf://NAME:CONFIG/SPLIT or hf://NAME/SPLIT")
        name, colon, tail = rest.partition(":")
        if colon:
            config, _, split = tail.partition("/")
            return cls(name, config or None, split or None)
        head, slash, last = rest.rpartition("/")
        on_disk = Path(rest).exists()
        names_split = slash and not on_disk and (Path(head).is_dir() or head.count("/") == 1 or last in {"train", "validation", "test"})
        return cls(head, None, last) if names_split else cls(rest, None, None)


def hugging_face_units(url: str) -> list[ReadUnit]:
    """One unit a shard. Several splits name the rows' splits; one alone is a plain set of rows to be divided."""
    chosen = HuggingFaceName.from_url(url)
    splits = hugging_face_splits(chosen.name, chosen.config)
    if chosen.split is not None and chosen.split not in splits:
        raise DataError(f"{url} has no split {chosen.split!r}; it has: {', '.join(splits)}")
    names = [chosen.split] if chosen.split is not None else list(splits)
    unknown = [name for name in names if len(names) > 1 and name not in SPLIT_ALIASES]
    if unknown:
        raise DataError(f"{url} has splits that are neither train, validation nor test ({', '.join(unknown)}): name one as {url}/SPLIT")
    version = hugging_face_version(chosen.name, chosen.config)
    return [
        ReadUnit(kind="hf", file=f"hf://{chosen.name}:{chosen.config or ''}/{name}#{shard}", part=shard, split=name,
                 names_split=len(names) > 1, version=version)
        for name in names
        for shard in range(splits[name].num_shards)
    ]  # fmt: skip


@lru_cache(maxsize=8)
def hugging_face_splits(name: str, config: str | None) -> dict[str, IterableDataset]:
    """Open a dataset for streaming, split by split; nothing is downloaded before rows are read.

    Cached because a task that reads one shard must not resolve the dataset's files again for the next. Raises DataError.
    """
    import datasets  # takes seconds to import, and most sources aren't Hugging Face datasets

    try:
        folder = Path(name)
        if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():  # written by save_to_disk
            loaded = datasets.load_from_disk(name)
            parts = loaded if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
            return {str(split): part.to_iterable_dataset() for split, part in parts.items()}
        opened = datasets.load_dataset(name, config, streaming=True)
        return {str(split): part for split, part in opened.items()}
    except Exception as error:  # the library raises a dozen unrelated types, from the hub's HTTP errors to its own
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"the Hugging Face dataset {name!r} (config {config or 'default'}) can't be opened: {reason}") from error


def hugging_face_version(name: str, config: str | None) -> str:
    """Return what changes when the dataset's files do: the fingerprint on disk, else the hash of its resolved data files."""
    import datasets  # see above

    folder = Path(name)
    for state in sorted(folder.rglob("state.json")) if folder.is_dir() else []:
        return str(json.loads(state.read_text("utf-8"))["_fingerprint"])
    builder = datasets.load_dataset_builder(name, config)
    origins = {str(split): [str(origin) for origin in files.origin_metadata] for split, files in (builder.config.data_files or {}).items()}
    return f"{builder.hash}:{json.dumps(origins, sort_keys=True)}"


def hugging_face_records(dataset: IterableDataset, shard: int, wanted: frozenset[str]) -> Iterator[Records]:
    """Read one shard of a streamed dataset; numbers count within the shard."""
    number = 1
    batches: Iterable[dict[str, list[object]]] = dataset.shard(dataset.num_shards, shard).iter(batch_size=ROWS_PER_CHUNK)
    for batch in batches:
        rows = len(next(iter(batch.values())))
        columns = {name: values for name, values in batch.items() if name in wanted}
        yield Records(tuple(batch), list(range(number, number + rows)), columns)
        number += rows
