"""PEFT's LoRA: one for everybody, without users; and one for each user, which starts from everybody's.

The rank, the scale and the layers are the generation's, the head is each model's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from plora_ray.adapters.blocks import in_top_blocks
from plora_ray.adapters.families import family_of
from plora_ray.adapters.inject import find_targets
from plora_ray.errors import ConfigError
from plora_ray.evaluation.labelled import LabelledTexts
from plora_ray.evaluation.metrics import Ints
from plora_ray.evaluation.predictor_cost import Size
from plora_ray.evaluation.rivals.rival import Advance, RivalSetup
from plora_ray.evaluation.rivals.text_model import build

NEWCOMER_EPOCHS = 5  # over a new user's examples: more make a model without a prior know them by heart
MOST_GIB = 8.0  # of users' adapters in memory


class PopulationLora:
    """One LoRA and head on all users' rows; users don't matter."""

    def __init__(self, setup: RivalSetup) -> None:
        self._setup = setup
        self.model = build(setup, self._with_lora)
        self._fitted = False

    def fit(self, rows: LabelledTexts, advance: Advance) -> None:
        if not self._fitted:  # a LoRA of each user's own starts from this one, too
            self.model.learn(self._setup.encode(rows.texts), self._setup.targets(rows), self._setup.course, advance)
        self._fitted = True

    def meet(self, rows: LabelledTexts, advance: Advance) -> None:
        advance(len(rows.texts))

    def logits(self, users: Ints, texts: Sequence[str]) -> NDArray[np.float32]:
        return self.model.logits(self._setup.encode(texts))

    def size(self) -> Size:
        return Size(0, sum(parameter.numel() for parameter in self.model.trained().values()))

    def _with_lora(self, plm: Any) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        spec = self._setup.spec
        family = family_of(plm.config.model_type, targets=spec.targets, pooling=spec.pooling)
        names = find_targets(plm, family.targets)
        if spec.top_layers is not None:
            names = in_top_blocks(plm, names, spec.top_layers)
        return get_peft_model(plm, LoraConfig(r=spec.rank, lora_alpha=spec.alpha, lora_dropout=0.0, target_modules=names))


class LoraPerUser:
    """A LoRA and head for each user: everybody's, trained on by as many passes over the user's own rows."""

    def __init__(self, setup: RivalSetup, population: PopulationLora) -> None:
        self._setup, self._population = setup, population
        self._everybody: dict[str, Tensor] = {}
        self._own: dict[int, dict[str, Tensor]] = {}
        self._newcomers: dict[int, dict[str, Tensor]] = {}

    def fit(self, rows: LabelledTexts, advance: Advance) -> None:
        """Raises ConfigError if the users' adapters wouldn't fit into memory."""
        users = np.unique(rows.users)
        needed = len(users) * self.size().per_user * 4 / 2**30
        if needed > MOST_GIB:
            raise ConfigError(f"lora-per-user would keep {needed:.0f} GiB of adapters: evaluate fewer users (data.filter) or leave it out")
        self._population.fit(rows, lambda _: None)  # counted as a baseline of its own, where it is one
        self._everybody = self._taken()
        self._own = {int(user): self._fitted(rows.of(user), self._setup.course.epochs, advance) for user in users}

    def meet(self, rows: LabelledTexts, advance: Advance) -> None:
        self._newcomers = {int(user): self._fitted(rows.of(user), NEWCOMER_EPOCHS, advance) for user in np.unique(rows.users)}

    def logits(self, users: Ints, texts: Sequence[str]) -> NDArray[np.float32]:
        found = np.empty((len(texts), self._setup.spec.outputs), np.float32)
        for user in np.unique(users):
            places = np.flatnonzero(users == user).tolist()
            self._put(self._newcomers.get(int(user)) or self._own.get(int(user)) or self._everybody)
            found[places] = self._population.model.logits(self._setup.encode([texts[place] for place in places]))
        self._put(self._everybody)
        return found

    def size(self) -> Size:
        per_user = self._population.size().in_all
        return Size(per_user, (1 + len(self._own)) * per_user)

    def _fitted(self, rows: LabelledTexts, epochs: int, advance: Advance) -> dict[str, Tensor]:
        self._put(self._everybody)
        course = replace(self._setup.course, epochs=epochs)
        self._population.model.learn(self._setup.encode(rows.texts), self._setup.targets(rows), course, advance)
        mine = self._taken()
        self._put(self._everybody)
        return mine

    def _taken(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self._population.model.trained().items()}

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self._population.model.trained().items():
            parameter.copy_(values[name])
