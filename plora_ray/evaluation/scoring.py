"""Texts through the engine for an evaluation: the population's answer once a text, a user's answer once a row.

Knows the engine and token ids; no users, labels or files.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from plora_ray.adapters.labels import LabelSpace
from plora_ray.evaluation.metrics import Floats, Ints, log_softmax
from plora_ray.evaluation.progress import Stages
from plora_ray.inference import InferenceEngine

ROWS_AT_ONCE = 1024  # handed to the engine together: a few dozen batches, and a progress bar that moves


class TextScorer:
    """Logits of `texts`, which later calls name by their index."""

    def __init__(self, engine: InferenceEngine, texts: Sequence[str], stages: Stages) -> None:
        self._engine, self._stages = engine, stages
        self._ids = [ids for start in range(0, len(texts), ROWS_AT_ONCE) for ids in engine.encode(texts[start : start + ROWS_AT_ONCE])]
        outputs = engine.loaded.labels.outputs
        self._population = np.full((len(texts), outputs), np.nan, np.float32)

    @property
    def mean_tokens(self) -> float:
        """Of a text."""
        return float(np.mean([len(ids) for ids in self._ids])) if self._ids else 1.0

    def population(self, row_texts: Ints) -> NDArray[np.float32]:
        """Logits [rows, outputs] without a user; a text that came before isn't computed again."""
        wanted = np.unique(row_texts)
        new = wanted[np.isnan(self._population[wanted]).any(axis=1)]
        if len(new):
            self._population[new] = self._score("texts without user", new, None)
        return self._population[row_texts]

    def personal(self, stage: str, row_texts: Ints, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits [rows, outputs] with each row's own user vector [rows, d]. stage: what the progress bar calls it."""
        return self._score(stage, row_texts, vectors)

    def _score(self, stage: str, row_texts: Ints, vectors: NDArray[np.float32] | None) -> NDArray[np.float32]:
        """Rows in order of length, so that a batch has little padding."""
        lengths = np.array([len(self._ids[text]) for text in row_texts])
        order = np.argsort(-lengths, kind="stable")
        result = np.empty((len(row_texts), self._population.shape[1]), np.float32)
        self._stages.begin(stage, len(row_texts))
        for start in range(0, len(order), ROWS_AT_ONCE):
            rows = order[start : start + ROWS_AT_ONCE]
            users = [None if vectors is None else torch.from_numpy(vectors[row]) for row in rows]
            result[rows] = self._engine.score([self._ids[row_texts[row]] for row in rows], users).float().numpy()
            self._stages.advance(len(rows))
        return result


def predictions(logits: NDArray[np.float32], labels: LabelSpace) -> Floats:
    """Log-probabilities [rows, classes], or a regression's values [rows] in the label's units, float64."""
    if labels.task == "regression":
        return logits[:, 0].astype(np.float64) * labels.std + labels.mean
    return log_softmax(logits.astype(np.float64))
