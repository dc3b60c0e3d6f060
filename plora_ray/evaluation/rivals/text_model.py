"""A classifier (or regressor) of texts around a frozen PLM in which something has been made trainable. Knows nothing of users."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from plora_ray.adapters.families import Pooling, family_of
from plora_ray.adapters.model import pool
from plora_ray.adapters.objective import task_losses
from plora_ray.adapters.pretrained import hidden_size, load_plm
from plora_ray.errors import ConfigError
from plora_ray.evaluation.metrics import Ints
from plora_ray.evaluation.rivals.course import Course, answers
from plora_ray.evaluation.rivals.rival import Advance, RivalSetup
from plora_ray.inference.engine import pad


class TextModel(nn.Module):
    """PLM, pooling and a head, as a personalised model has them. The PLM runs without its own dropout, as when serving.

    plm: with the parameters that are to be learnt made trainable, and no others.
    """

    def __init__(self, plm: nn.Module, pooling: Pooling, width: int, setup: RivalSetup) -> None:
        super().__init__()
        self.plm, self._pooling, self._setup = plm.eval(), pooling, setup
        torch.manual_seed(setup.course.seed)
        self.head = nn.Linear(width, setup.spec.outputs)
        self.to(setup.device)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits [batch, outputs], fp32. input_ids, attention_mask: [batch, tokens] int64."""
        device = self._setup.device
        mask = attention_mask.to(device)
        hidden = self.plm(input_ids=input_ids.to(device), attention_mask=mask).last_hidden_state
        return self.head(pool(hidden, mask, self._pooling).to(self.head.weight.dtype)).float()

    def trained(self) -> dict[str, nn.Parameter]:
        """What is learnt: by name, the PLM's trainable parameters and the head's."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def learn(self, ids: Sequence[Sequence[int]], targets: Tensor, course: Course, advance: Advance) -> None:
        """Minimise the mean task loss over rows of token ids. targets: [rows]."""

        def loss_of(places: Ints) -> Tensor:
            logits = self(*pad([ids[place] for place in places], self._setup.pad_id))
            return task_losses(logits, targets[torch.from_numpy(places)], self._setup.spec.task).mean()

        course.train(self.trained().values(), [len(row) for row in ids], loss_of, advance)

    def logits(self, ids: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """[rows, outputs]."""
        course = self._setup.course
        return answers(
            lambda input_ids, mask, _: self(input_ids, mask), ids,
            pad_id=self._setup.pad_id, batch_tokens=course.batch_tokens, batch_rows=course.batch_rows,
        )  # fmt: skip


def build(setup: RivalSetup, make_trainable: Callable[[Any], nn.Module]) -> TextModel:
    """A model around the generation's PLM, in which `make_trainable(plm)` has set free what is to be learnt.

    Raises ConfigError, with PEFT's own reason, if the method doesn't know this family of models.
    """
    plm: Any = load_plm(setup.spec.model)
    family = family_of(plm.config.model_type, targets=setup.spec.targets, pooling=setup.spec.pooling)
    width = hidden_size(plm)
    torch.manual_seed(setup.course.seed)
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # PEFT asks for what transformers has renamed
            trainable = make_trainable(plm)
        return TextModel(trainable, family.pooling, width, setup)
    except (ValueError, NotImplementedError, TypeError, KeyError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(f"a baseline can't be built on model family {plm.config.model_type} ({reason}): leave it out") from error
