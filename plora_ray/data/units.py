"""What one task reads of a source, wherever that lies: the common currency of all kinds of sources."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from plora_ray.data.locations import shown_location


class ReadUnit(BaseModel):
    """What one task reads. `first` is the first row of a row group (from 1) or the first synthetic user (from 0)."""

    model_config = ConfigDict(frozen=True)

    kind: Literal["parquet", "csv", "jsonl", "hf", "paper", "lamp", "synthetic"]
    file: str  # a path, or the URL of what isn't a file
    part: int = 0  # row group or shard
    first: int = 0
    count: int = 0  # synthetic users
    rows: int = 0  # as far as the source tells without being read
    split: str | None = None  # the Hugging Face split to read
    names_split: bool = False  # whether that split is also the rows' split
    size_bytes: int = 0  # of the file; of a row group without compression
    version: str = ""  # changes when the content does

    @property
    def shown(self) -> str:
        """The file as people may see it."""
        return shown_location(self.file)
