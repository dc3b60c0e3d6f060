"""Rows of (user_id, text, label, timestamp) on their way to the model: read from a source, validated, partitioned by user on
the cluster, tokenised once, and handed out in batches bounded by tokens. Below this room nobody sees a raw user id or text."""

from plora_ray.data.batches import collate, pad_tokens, token_budget_batches
from plora_ray.data.partition import PartitionProgress, partition_rows
from plora_ray.data.rows import SPLITS, SplitName, Task
from plora_ray.data.source_settings import ColumnMapping, SourceSettings
from plora_ray.data.stats import PartitionCounts, PartitionStats, label_space
from plora_ray.data.table import PartitionTable, read_partition

__all__ = [
    "SPLITS",
    "ColumnMapping",
    "PartitionCounts",
    "PartitionProgress",
    "PartitionStats",
    "PartitionTable",
    "SourceSettings",
    "SplitName",
    "Task",
    "collate",
    "label_space",
    "pad_tokens",
    "partition_rows",
    "read_partition",
    "token_budget_batches",
]
