"""PLoRA as its authors train it: users' vectors, A, B, P and the head jointly, end to end, by one dense AdamW.

Shapes and settings are those of the released configuration (yoyo-yun/PLoRA, commit c880d98, cfgs/bert_model.yml and cfgs/config.py).
A new user's vector starts at zero and learns by the same optimiser, all else frozen, ten times as fast (cfgs/config.py, cohort b).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from plora_ray.adapters.model import AdapterSpec, PersonalizedModel
from plora_ray.adapters.objective import MutualInformation, PopulationObjective, task_losses
from plora_ray.evaluation.labelled import LabelledTexts
from plora_ray.evaluation.metrics import Ints
from plora_ray.evaluation.predictor_cost import Size
from plora_ray.evaluation.rivals.course import answers
from plora_ray.evaluation.rivals.lora import NEWCOMER_EPOCHS
from plora_ray.evaluation.rivals.rival import Advance, RivalSetup
from plora_ray.inference.engine import pad

RANK, ALPHA, USER_DIM, DROPOUT = 64, 128.0, 512, 0.1
NEWCOMER_RATE = 10.0
ADAMW_WEIGHT_DECAY = 0.01  # torch's, which the released optimiser leaves as it is


@dataclass(frozen=True)
class Recipe:
    """learning_rate: of everything, constant. user_dropout: rho. batch_rows: of a step."""

    learning_rate: float
    user_dropout: float
    information: MutualInformation
    batch_rows: int


AS_RELEASED = Recipe(2e-6, 0.0, MutualInformation(0.0), 16)


def end_to_end(setup: RivalSetup) -> Recipe:
    """Both of the paper's terms, at the generation's own learning rate and batches: the released rate needs tens of passes."""
    training = setup.settings.training
    return Recipe(setup.course.learning_rate, training.user_dropout, MutualInformation(0.1), training.batch_rows)


class ReleasedPlora:
    """One user, one row of a dense table [users + 1, USER_DIM], whose first row stays zero: nobody."""

    def __init__(self, setup: RivalSetup, recipe: Recipe) -> None:
        self._setup, self._recipe = setup, recipe
        self._course = replace(
            setup.course, learning_rate=recipe.learning_rate, weight_decay=ADAMW_WEIGHT_DECAY, clipping=math.inf,
            batch_rows=recipe.batch_rows, decays=False,
        )  # fmt: skip
        torch.manual_seed(setup.course.seed)
        model = PersonalizedModel.from_pretrained(self._spec()).to(setup.device)
        self._objective = PopulationObjective(model, user_dropout=recipe.user_dropout, mutual_information=recipe.information)
        self._vectors: dict[int, Tensor] = {}
        self._newcomers: dict[int, Tensor] = {}

    def fit(self, rows: LabelledTexts, advance: Advance) -> None:
        users, places = np.unique(rows.users, return_inverse=True)
        table = nn.Parameter(torch.zeros(len(users), USER_DIM, device=self._setup.device))
        ids, targets = self._setup.encode(rows.texts), self._setup.targets(rows)
        self._objective.train()

        def loss_of(batch: Ints) -> Tensor:
            return self.loss([ids[row] for row in batch], table[torch.from_numpy(places[batch])], targets[torch.from_numpy(batch)])

        self._course.train([*self._shared(), table], [len(row) for row in ids], loss_of, advance)
        self._objective.eval()
        self._vectors = {int(user): table.detach()[place] for place, user in enumerate(users)}

    def meet(self, rows: LabelledTexts, advance: Advance) -> None:
        users, places = np.unique(rows.users, return_inverse=True)
        table = nn.Parameter(torch.zeros(len(users), USER_DIM, device=self._setup.device))
        ids, targets = self._setup.encode(rows.texts), self._setup.targets(rows)

        def loss_of(batch: Ints) -> Tensor:
            vectors = table[torch.from_numpy(places[batch])]
            logits = self._forward(*pad([ids[row] for row in batch], self._setup.pad_id), vectors)
            return task_losses(logits, targets[torch.from_numpy(batch)], self._setup.spec.task).mean()

        course = replace(self._course, epochs=NEWCOMER_EPOCHS, learning_rate=NEWCOMER_RATE * self._recipe.learning_rate)
        course.train([table], [len(row) for row in ids], loss_of, advance)
        self._newcomers = {int(user): table.detach()[place] for place, user in enumerate(users)}

    def loss(self, ids: Sequence[Sequence[int]], vectors: Tensor, targets: Tensor) -> Tensor:
        """What a step minimises for rows with their users' vectors [rows, USER_DIM] and targets [rows]."""
        input_ids, mask = (part.to(self._setup.device) for part in pad(ids, self._setup.pad_id))
        return self._objective(input_ids, mask, vectors, targets, torch.ones(len(ids), device=self._setup.device))

    def logits(self, users: Ints, texts: Sequence[str]) -> NDArray[np.float32]:
        nobody = torch.zeros(USER_DIM, device=self._setup.device)
        own = {**self._vectors, **self._newcomers}
        vectors = torch.stack([own.get(int(user), nobody) for user in users])
        return answers(
            lambda input_ids, mask, places: self._forward(input_ids, mask, vectors[torch.from_numpy(places)]), self._setup.encode(texts),
            pad_id=self._setup.pad_id, batch_tokens=self._course.batch_tokens, batch_rows=self._setup.course.batch_rows,
        )  # fmt: skip

    def size(self) -> Size:
        shared = sum(parameter.numel() for parameter in self._shared())
        return Size(USER_DIM, shared + USER_DIM * len(self._vectors))

    def _shared(self) -> list[nn.Parameter]:
        """A, B, P and the head: the paper's layers have no q, which stays zero here."""
        return [parameter for name, parameter in self._objective.model.shared_parameters().items() if not name.endswith(".q")]

    def _forward(self, input_ids: Tensor, mask: Tensor, vectors: Tensor) -> Tensor:
        return self._objective.model(input_ids.to(self._setup.device), mask.to(self._setup.device), vectors)

    def _spec(self) -> AdapterSpec:
        return replace(
            self._setup.spec, kind="plora", rank=RANK, alpha=ALPHA, user_dim=USER_DIM, dropout=DROPOUT, top_layers=None, head_terms="none"
        )
