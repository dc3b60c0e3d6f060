"""Which solver fits a generation's users, and how: kept with the generation, so that few-shot fits go as training went."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from plora_ray.adapters.adam import AdamSteps

Solver = Literal["newton", "adam"]


@dataclass(frozen=True)
class UserFit:
    """solver: newton (fit.py) or adam (adam.py). steps: how Adam goes. pull: for private matrices, the precision lambda of the
    pull towards where a user starts; vectors are pulled by the generation's prior. guard: whether users whom Newton's fit harms go without.
    """

    solver: Solver = "newton"
    steps: AdamSteps = AdamSteps()
    pull: float = 1.0
    guard: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain values. Without a guard as before there was one, so that older programs read them, too."""
        values = asdict(self)
        return values if self.guard else {name: value for name, value in values.items() if name != "guard"}

    @classmethod
    def from_json(cls, values: dict[str, Any] | None) -> UserFit:
        """The fit that `to_json` gave; a generation that names none was fitted by Newton's method."""
        return cls() if values is None else cls(**{**values, "steps": AdamSteps(**values["steps"])})
