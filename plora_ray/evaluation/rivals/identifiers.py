"""The user as text: a random string of tokens in front of every text, and few shared parameters tuned to read it.

UserIdentifier (Mireshghallah et al., arXiv 2110.00135): each user's string is drawn uniformly from the vocabulary and is all that the
model knows of the user; nothing is learnt for one user alone. Tuned by IA3 or prefix tuning (PEFT), or by BitFit (biases only).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from plora_ray.errors import ConfigError
from plora_ray.evaluation.labelled import LabelledTexts
from plora_ray.evaluation.metrics import Ints
from plora_ray.evaluation.predictor_cost import Size
from plora_ray.evaluation.rivals.rival import Advance, RivalSetup, strangers
from plora_ray.evaluation.rivals.text_model import build

IDENTIFIER_TOKENS = 10
PREFIX_TOKENS = 10
STRANGER = b"stranger"  # in front of a key: that of somebody else


def identifier(key: bytes, seed: int, tokens: Ints) -> list[int]:
    """A user's string: IDENTIFIER_TOKENS of `tokens`, drawn uniformly; the same for the same user's key and seed."""
    digest = hashlib.blake2b(key, key=seed.to_bytes(8, "big"), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "big")).choice(tokens, IDENTIFIER_TOKENS).tolist()


class UserIdentifier:
    """make_trainable: sets free what is tuned in a PLM. learning_rate: None takes the population stage's."""

    def __init__(self, setup: RivalSetup, make_trainable: Callable[[Any], nn.Module], learning_rate: float | None) -> None:
        self._setup = setup
        own = setup.course.learning_rate if learning_rate is None else learning_rate * setup.rate_factor
        self._course = replace(setup.course, learning_rate=own)
        self._model = build(setup, make_trainable)

    def fit(self, rows: LabelledTexts, advance: Advance) -> None:
        self._model.learn(self.read_by(rows.users, rows.texts), self._setup.targets(rows), self._course, advance)

    def meet(self, rows: LabelledTexts, advance: Advance) -> None:
        advance(len(rows.texts))

    def logits(self, users: Ints, texts: Sequence[str]) -> NDArray[np.float32]:
        return self._model.logits(self.read_by(users, texts))

    def size(self) -> Size:
        return Size(0, sum(parameter.numel() for parameter in self._model.trained().values()))

    def trained(self) -> dict[str, nn.Parameter]:
        """What is tuned, by name."""
        return self._model.trained()

    def read_by(self, users: Ints, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text behind its user's string; a text that leaves no place for it loses its end."""
        setup = self._setup
        room, found = setup.longest - IDENTIFIER_TOKENS - PREFIX_TOKENS, []
        stands_for = np.where(users < 0, strangers(users), users).tolist()
        for user, like, ids in zip(users, stands_for, setup.encode(texts), strict=True):
            key = setup.keys[like] if user >= 0 else STRANGER + setup.keys[like]
            name = identifier(key, setup.course.seed, setup.ordinary_tokens)
            kept = ids if len(ids) <= room else [*ids[: room - 1], ids[-1]]
            found.append([*kept[: setup.leading], *name, *kept[setup.leading :]])
        return found


def with_ia3(plm: Any) -> nn.Module:
    """IA3 (Liu et al., arXiv 2205.05638) in the layers that PEFT chooses for the family."""
    from peft import IA3Config, get_peft_model

    return get_peft_model(plm, IA3Config())


def with_prefix(plm: Any) -> nn.Module:
    """Prefix tuning (Li and Liang, arXiv 2101.00190): PREFIX_TOKENS keys and values a layer."""
    from peft import PrefixTuningConfig, get_peft_model

    return get_peft_model(plm, PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=PREFIX_TOKENS))


def with_biases(plm: Any) -> nn.Module:
    """BitFit (Ben Zaken et al., arXiv 2106.10199): every bias of the model. Raises ConfigError for a model without any."""
    biases = [parameter for name, parameter in plm.named_parameters() if name.rpartition(".")[2] == "bias"]
    if not biases:
        raise ConfigError("user-identifier-bitfit needs a model with biases, and this one has none: leave it out")
    for bias in biases:
        bias.requires_grad_(True)
    return plm
