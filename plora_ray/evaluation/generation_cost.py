"""What the generation's own two predictors cost, beside those of the baselines: measured through the engine that serves."""

from __future__ import annotations

import numpy as np
import torch

from plora_ray.evaluation.comparison import POPULATION, WITH_USER
from plora_ray.evaluation.predictor_cost import PredictorCost, sampled, seconds_per_request
from plora_ray.evaluation.rows import EvaluationRows
from plora_ray.inference import InferenceEngine


def generation_costs(engine: InferenceEngine, rows: EvaluationRows) -> dict[str, PredictorCost]:
    """Of the answer with a user and without, for the generation's users among `rows`. Adapters are at hand, as in a warm cache."""
    loaded = engine.loaded
    tensors = loaded.reader.shared().tensors
    shared = sum(tensor.numel() for name, tensor in tensors.items() if not name.startswith("prior."))
    width, tests = loaded.model.user_width, sampled(rows)
    found = loaded.reader.get_many([rows.keys[rows.row_users[row]] for row in tests])
    vectors = {key: torch.tensor(np.array(adapter.record)) for key, adapter in found.items()}

    def with_user(row: int) -> object:
        return engine.score(engine.encode([rows.texts[rows.row_texts[row]]]), [vectors.get(rows.keys[rows.row_users[row]])])

    def population(row: int) -> object:
        return engine.score(engine.encode([rows.texts[rows.row_texts[row]]]), [None])

    in_all = shared + width * int(rows.known.sum())
    return {
        WITH_USER: PredictorCost(width, in_all, 4 * in_all, seconds_per_request(with_user, tests)),
        POPULATION: PredictorCost(0, shared, 4 * shared, seconds_per_request(population, tests)),
    }
