"""What a finished partitioning is: its counts, the file that marks it as finished, and the label space they imply.

Knows numbers about rows, never rows. `_done.json` is written last; a folder without it holds nothing to trust.
"""

from __future__ import annotations

import json
from collections import Counter

from pydantic import BaseModel, ConfigDict, ValidationError

from plora_ray.data.rows import SPLITS, SplitName, Task
from plora_ray.errors import DataError
from plora_ray.store.objects import ObjectStore

DONE_FILE = "_done.json"
MAX_CLASSES = 10_000  # beyond it a label column holds texts or ids, and every map would carry them all


class PartitionCounts(BaseModel):
    """One partition. `train_users` have at least one training row: they are the ones that get an adapter of their own.

    label_mean, label_squares: of the training rows of a regression, their mean and the sum of squared deviations from it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    users: int
    train_users: int
    rows: dict[SplitName, int]
    tokens: int
    label_mean: float = 0.0
    label_squares: float = 0.0


class PartitionStats(BaseModel):
    """A whole partitioning.

    `label_counts[split][label]` are rows (classification only); `skipped[reason]` are bad rows left out; `digest` tells
    which rows, settings, tokenizer and key secret it was made from. `split_column`: whether the source has one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    digest: str
    partitions: list[PartitionCounts]
    label_counts: dict[SplitName, dict[str, int]]
    skipped: dict[str, int]
    split_column: bool = False

    @property
    def users(self) -> int:
        return sum(part.users for part in self.partitions)

    @property
    def train_users(self) -> int:
        return sum(part.train_users for part in self.partitions)

    @property
    def tokens(self) -> int:
        return sum(part.tokens for part in self.partitions)

    def rows(self, split: SplitName | None = None) -> int:
        """Rows in a split, or in all."""
        return sum(count for part in self.partitions for name, count in part.rows.items() if split in (None, name))

    def label_moments(self) -> tuple[float, float]:
        """Mean and standard deviation of a regression's training labels."""
        total = self.rows("train")
        mean = sum(part.rows["train"] * part.label_mean for part in self.partitions) / total
        squares = sum(part.label_squares + part.rows["train"] * (part.label_mean - mean) ** 2 for part in self.partitions)
        return mean, (squares / total) ** 0.5


def _is_fraction(name: str) -> bool:
    whole, point, part = name.removeprefix("-").partition(".")
    return bool(point) and (whole + part).isdecimal()


def label_space(stats: PartitionStats, task: Task) -> list[str]:
    """Return the classes in the order of the model's outputs: by value if all are integers, else by name.

    Empty for regression. Raises DataError if training has fewer than two classes, or lacks one that another split has.
    """
    if task == "regression":
        return []
    trained = set(stats.label_counts["train"])
    for split in SPLITS[1:]:
        unseen = sorted(set(stats.label_counts[split]) - trained)
        if unseen:
            listed = ", ".join(repr(name) for name in unseen[:20])
            numbers = all(_is_fraction(name) for name in unseen)
            remedy = "set task: regression if they are amounts" if numbers else "add training rows or remove them"
            raise DataError(f"labels that only the {split} split has can't be learned: {listed}; {remedy}")
    if len(trained) < 2:
        found = f"only {next(iter(trained))!r}" if trained else "none"
        raise DataError(f"classification needs training rows of at least two labels, found {found}: check columns.label and the splits")
    if all(name.removeprefix("-").isdecimal() for name in trained):
        return sorted(trained, key=int)
    return sorted(trained)


def add_labels(total: dict[SplitName, Counter[str]], counts: dict[str, dict[str, int]]) -> None:
    """Add one unit's label counts to the total. Raises DataError when there are too many classes to be classes."""
    for split in SPLITS:
        total[split].update(counts.get(split, {}))
        refuse_too_many_classes(len(total[split]))


def refuse_too_many_classes(classes: int) -> None:
    """Raise DataError if a label column can't be one of classes."""
    if classes > MAX_CLASSES:
        raise DataError(f"the label column has more than {MAX_CLASSES} different values: map columns.label or set task: regression")


def read_done(objects: ObjectStore, digest: str) -> PartitionStats | None:
    """Return the stats of the partitioning that was finished in this folder, None if there is none.

    Raises DataError if it is finished but was made from other rows or settings.
    """
    data = objects.read_many([DONE_FILE]).get(DONE_FILE)
    try:
        stats = PartitionStats.model_validate(json.loads(data or b""))
    except (ValueError, ValidationError):
        return None
    if stats.digest != digest:
        raise DataError(f"{objects.uri} holds partitions of other rows or settings: give an empty folder or delete it")
    return stats


def write_done(objects: ObjectStore, stats: PartitionStats) -> None:
    """Mark the partitioning as finished."""
    objects.write(DONE_FILE, stats.model_dump_json(indent=1).encode("utf-8"))
