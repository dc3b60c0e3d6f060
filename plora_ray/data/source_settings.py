"""The settings under `data:`: where rows come from and what the source calls its columns. Reads nothing."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from plora_ray.data.locations import holds_credentials, shown_location
from plora_ray.data.rows import RowRules, Task
from plora_ray.data.splits import SplitRules, SplitTimes
from plora_ray.errors import DataError


class ColumnMapping(BaseModel):
    """What the source calls its columns. `timestamp` and `split` may be absent under their default names, or null: not used.

    group: a column of few values by which evaluations report, such as country or age; it is used for nothing else.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    user_id: str = "user_id"
    text: str = "text"
    label: str = "label"
    timestamp: str | None = "timestamp"
    split: str | None = "split"
    group: str | None = None

    @model_validator(mode="after")
    def _groups_are_not_people(self) -> ColumnMapping:
        if self.group in {self.user_id, self.text}:
            raise ValueError(
                f"group is {self.group!r}, the column of user ids or texts, which no report may hold: name a column of few values"
            )
        return self

    def resolve(self, available: tuple[str, ...], file: str) -> ColumnMapping:
        """Return the mapping with absent optional columns set to None. Raises DataError naming the columns that exist."""
        required = {"user_id": self.user_id, "text": self.text, "label": self.label}
        # A name that differs from the default was chosen by somebody: its absence is a typing error, not an option.
        required |= {role: name for role, name in self.optional().items() if name != role or role == "group"}
        missing = [f"{name!r} (columns.{role})" for role, name in required.items() if name not in available]
        if missing:
            raise DataError(f"{file} has no column {', '.join(missing)}; it has: {', '.join(available) or 'none'}")
        return self.model_copy(update={role: None for role, name in self.optional().items() if name not in available})

    def optional(self) -> dict[str, str]:
        """The optional roles in use and their column names."""
        named = {"timestamp": self.timestamp, "split": self.split, "group": self.group}
        return {role: name for role, name in named.items() if name is not None}


class SourceSettings(BaseModel):
    """The settings under `data:`. Only rows whose columns equal all of `filter` are kept.

    The fractions divide the texts when the source has no split column, by a draw that `split_seed` names; `split_times` divides the rows
    by their timestamps instead, whatever a split column says. `storage_options` go to the file system (fsspec).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = "synthetic://"
    columns: ColumnMapping = Field(default_factory=ColumnMapping)
    filter: dict[str, str | bool | int | float] = Field(default_factory=dict)
    on_bad_row: Literal["stop", "skip"] = "stop"
    validation_fraction: float = Field(0.1, ge=0, lt=1)
    test_fraction: float = Field(0.1, ge=0, lt=1)
    split_seed: int = Field(0, ge=0, lt=2**63)
    split_times: SplitTimes | None = None
    max_text_chars: int = Field(20_000, ge=1)
    storage_options: dict[str, Any] = Field(default_factory=dict, repr=False)

    @model_validator(mode="after")
    def _no_password(self) -> SourceSettings:
        if holds_credentials(self.source):
            raise ValueError(
                "source holds a user name or password: put them into data.storage_options (username, password, client_kwargs, ... "
                "as the file system names them) or into the environment"
            )
        return self

    @model_validator(mode="after")
    def _leave_rows_to_train_on(self) -> SourceSettings:
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError("validation_fraction + test_fraction must be below 1: nothing would be left to train on")
        return self

    @property
    def shown(self) -> str:
        """The source as people may see it."""
        return shown_location(self.source)

    def row_rules(self, task: Task) -> RowRules:
        """What its rows must satisfy."""
        return RowRules(task, self.max_text_chars, dated=self.split_times is not None)

    def split_rules(self) -> SplitRules:
        """How its rows are divided where it doesn't say so itself."""
        return SplitRules(self.split_seed, self.validation_fraction, self.test_fraction, self.split_times)
