"""What evaluations are told beside the data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator

from plora_ray.config.section import Section
from plora_ray.data.rows import RowProblem, class_label


def _class_names(value: Any) -> Any:
    """Keys as data loading names classes: YAML writes 1 or yes where a file has "1"."""
    if not isinstance(value, dict):
        return value
    try:
        named = [(class_label(key), inner) for key, inner in value.items()]
    except RowProblem as problem:
        raise ValueError(str(problem)) from None
    if len({name for name, _ in named}) < len(named):
        raise ValueError("a class is named twice")
    return dict(named)


Costs = Annotated[dict[str, float], BeforeValidator(_class_names)]


class EvaluationSettings(Section):
    """`plora evaluate`. cost_matrix: label -> class answered -> cost, in any unit; what is right costs nothing unless it says so.

    leave_out_learnt_texts: whether test rows with a text that training or validation rows have, too, are left out.
    baseline_rates: factors on each trained baseline's learning rate; of several, validation rows choose.
    prices: file of prices, as `plora plan` takes one, for a page of costs; rps_per_million_users: texts a second at the busiest time.
    """

    cost_matrix: Annotated[dict[str, Costs], BeforeValidator(_class_names)] | None = None
    leave_out_learnt_texts: bool = False
    baseline_rates: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = Field((1.0,), min_length=1)
    prices: Path | None = None
    rps_per_million_users: float = Field(100.0, gt=0)

    @field_validator("cost_matrix")
    @classmethod
    def _finite(cls, value: dict[str, dict[str, float]] | None) -> dict[str, dict[str, float]] | None:
        for label, costs in (value or {}).items():
            for answer, cost in costs.items():
                if not math.isfinite(cost):
                    raise ValueError(f"the cost of answering {answer} where {label} is right is {cost}: write a number")
        return value
