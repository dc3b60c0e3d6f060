"""What predictors cost that nothing is trained for: the generation's two, through the engine that serves, and those by labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from plora_ray.evaluation.comparison import LABEL_PRIOR, MAJORITY, POPULATION, WITH_USER
from plora_ray.evaluation.metrics import Floats, Ints
from plora_ray.evaluation.predictor_cost import PredictorCost, Size, sampled, seconds_per_request
from plora_ray.evaluation.rows import EvaluationRows
from plora_ray.inference import InferenceEngine, LoadedGeneration


def shared_numbers(loaded: LoadedGeneration) -> int:
    """How many numbers a generation has learnt for all its users; the prior, which only fits of new users read, isn't counted."""
    return sum(tensor.numel() for name, tensor in loaded.reader.shared().tensors.items() if not name.startswith("prior."))


def generation_costs(engine: InferenceEngine, rows: EvaluationRows) -> dict[str, PredictorCost]:
    """Of the answer with a user and without, for the generation's users among `rows`. Adapters are at hand, as in a warm cache."""
    loaded = engine.loaded
    shared, width, tests = shared_numbers(loaded), loaded.model.user_width, sampled(rows)
    found = loaded.reader.get_many([rows.keys[rows.row_users[row]] for row in tests])
    vectors = {key: torch.tensor(np.array(adapter.record)) for key, adapter in found.items()}

    def with_user(row: int) -> object:
        return engine.score(engine.encode([rows.texts[rows.row_texts[row]]]), [vectors.get(rows.keys[rows.row_users[row]])])

    def population(row: int) -> object:
        return engine.score(engine.encode([rows.texts[rows.row_texts[row]]]), [None])

    in_all = shared + width * int(rows.known.sum())
    return {
        WITH_USER: PredictorCost(Size(width, in_all), seconds_per_request(with_user, tests)),
        POPULATION: PredictorCost(Size(0, shared), seconds_per_request(population, tests)),
    }


def label_costs(rows: EvaluationRows, names: Sequence[str]) -> dict[str, PredictorCost]:
    """Of those of MAJORITY and LABEL_PRIOR that `names` has: a count of each class, or a sum and a number, for everybody or each user."""
    history, tests = rows.history, sampled(rows)
    users, width = int(history.by_user.any(axis=1).sum()), history.by_user.shape[1]
    sizes = {MAJORITY: Size(0, len(history.overall)), LABEL_PRIOR: Size(width, len(history.overall) + width * users)}
    found = {}
    for name, ask in ((MAJORITY, history.majority), (LABEL_PRIOR, history.label_prior)):

        def answer(row: int, ask: Callable[[Ints], Floats] = ask) -> object:
            return ask(rows.row_users[row : row + 1])

        if name in names:
            found[name] = PredictorCost(sizes[name], seconds_per_request(answer, tests))
    return found
