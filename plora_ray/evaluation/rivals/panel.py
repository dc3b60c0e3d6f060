"""The trained baselines of one evaluation: fitted on its training rows, then asked whatever the generation is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from plora_ray.config import Settings
from plora_ray.errors import DataError
from plora_ray.evaluation.comparison import SHUFFLED, examples_told
from plora_ray.evaluation.labelled import LabelledTexts
from plora_ray.evaluation.metrics import Floats, Ints
from plora_ray.evaluation.predictor_cost import PredictorCost, sampled, seconds_per_request
from plora_ray.evaluation.progress import Stages
from plora_ray.evaluation.rivals.calibrations import RivalCalibration
from plora_ray.evaluation.rivals.course import Course
from plora_ray.evaluation.rivals.rates import BestRate, TriedRates
from plora_ray.evaluation.rivals.registry import build_rivals
from plora_ray.evaluation.rivals.rival import Rival, RivalSetup
from plora_ray.evaluation.rows import EvaluationRows
from plora_ray.evaluation.scoring import predictions
from plora_ray.inference import LoadedGeneration


class RivalPanel:
    """names: of registry.RIVALS; none is fine. Raises DataError if there are no rows to train on.

    calibrations: by name, of the rivals, on validation rows; what the job has trained it has calibrated itself. rates: by name, of
    those whose learning rate was chosen.
    """

    def __init__(self, names: Sequence[str], settings: Settings, loaded: LoadedGeneration, rows: EvaluationRows, stages: Stages) -> None:
        self._loaded, self._rows, self._stages = loaded, rows, stages
        self._rivals: Mapping[str, Rival] = {}
        self.calibrations: dict[str, RivalCalibration] = {}
        self.rates: dict[str, TriedRates] = {}
        if not names:
            return
        if rows.training is None or not len(rows.training.users):
            raise DataError(f"baseline {names[0]} needs training rows of users in the generation, and the data has none")
        self._rivals = build_rivals(names, setup_of(settings, loaded, rows))
        calibrates = settings.training.calibrate and settings.task == "classification"
        for name, rival in self._rivals.items():
            times = len(settings.evaluation.baseline_rates) if isinstance(rival, BestRate) else 1
            stages.begin(f"training {name}", len(rows.training.texts) * settings.training.epochs * times)
            rival.fit(rows.training, stages.advance)
            if isinstance(rival, BestRate):
                self.rates[name] = rival.tried
            if calibrates and name != SHUFFLED and rows.validation is not None and len(rows.validation.users):
                self.calibrations[name] = RivalCalibration.of(rival, loaded.labels, rows.training, rows.validation)

    def predict(self, chosen: Ints, examples: int | None) -> dict[str, Floats]:
        """What each says of the test rows `chosen`. examples: how many of each user are known to it; None for trained users."""
        rows = self._rows
        users, texts = rows.row_users[chosen], [rows.texts[text] for text in rows.row_texts[chosen]]
        found = {}
        for name, rival in self._rivals.items():
            if examples is not None:
                self._stages.begin(f"{name} on {examples_told(examples)} of new users", 0)
                rival.meet(self._examples(users, examples), self._stages.advance)
            self._stages.begin(f"rows by {name}", 0)
            logits = rival.logits(users, texts)
            if name in self.calibrations:
                logits = self.calibrations[name].at(examples).of_logits(torch.from_numpy(logits)).numpy()
            found[name] = predictions(logits, self._loaded.labels)
        return found

    def costs(self) -> dict[str, PredictorCost]:
        """Of each, asked for test rows of trained users one at a time."""
        rows = self._rows
        found = {}
        for name, rival in self._rivals.items():

            def answer(row: int, rival: Rival = rival) -> object:
                return rival.logits(rows.row_users[row : row + 1], [rows.texts[rows.row_texts[row]]])

            found[name] = PredictorCost(rival.size(), seconds_per_request(answer, sampled(rows)))
        return found

    def _examples(self, users: Ints, count: int) -> LabelledTexts:
        own = self._rows.examples
        return LabelledTexts.of_rows([(int(user), *example) for user in np.unique(users) for example in own.get(int(user), ())[:count]])


def setup_of(settings: Settings, loaded: LoadedGeneration, rows: EvaluationRows) -> RivalSetup:
    """What rivals of a generation are built from."""
    tokenizer, spec = loaded.tokenizer, loaded.model.spec
    config: Any = loaded.model.plm.config
    special = set(tokenizer.all_special_ids)
    framing = special - {tokenizer.unk_token_id}
    leading = next((place for place, token in enumerate(loaded.encode(["a"])[0]) if token not in framing), 0)
    return RivalSetup(
        settings=settings,
        spec=spec,
        labels=loaded.labels,
        course=Course.like(settings.training),
        device=loaded.device,
        encode=loaded.encode,
        pad_id=tokenizer.pad_token_id or 0,
        ordinary_tokens=np.array([token for token in range(len(tokenizer)) if token not in special]),
        leading=leading,
        longest=min(getattr(config, "max_position_embeddings", None) or 2**31, tokenizer.model_max_length),
        keys=rows.keys,
        validation=rows.validation or LabelledTexts.of_rows([]),
    )
