"""What every section of the settings has in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Unknown keys are errors, and nothing changes after it was validated."""

    model_config = ConfigDict(extra="forbid", frozen=True)
