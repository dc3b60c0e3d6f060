"""Our own method with the users shuffled among the rows: what it gains when there is nothing to learn of a user.

The job itself trains, in a process of its own and into a store that is deleted afterwards. Users are numbers in its rows.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor

from plora_ray.adapters.labels import LabelSpace
from plora_ray.errors import ModelError
from plora_ray.evaluation.generation_cost import shared_numbers
from plora_ray.evaluation.labelled import LabelledTexts
from plora_ray.evaluation.metrics import Ints
from plora_ray.evaluation.predictor_cost import Size
from plora_ray.evaluation.rivals.course import answers
from plora_ray.evaluation.rivals.rival import Advance, RivalSetup
from plora_ray.inference import Examples, FewShotFitter, LoadedGeneration, load_generation
from plora_ray.store import AdapterStore

# What belongs to a run that people watch or that goes on from another one.
COMMAND = ["-m", "plora_ray.train_all"]
UNKNOWN_LOGIT = -20.0  # below the largest: of a class that the job has no rows of
LEFT_OUT = {"tensorboard_dir", "mlflow", "warm_start", "only_users_with_new_data", "activate"}


class ShuffledUsers:
    """A generation whose every row was given to a user drawn from all rows' users; each keeps as many training rows as he has."""

    def __init__(self, setup: RivalSetup) -> None:
        self._setup = setup
        self._loaded: LoadedGeneration | None = None
        self._shared = 0
        self._vectors: dict[int, Tensor] = {}
        self._newcomers: dict[int, Tensor] = {}

    def fit(self, rows: LabelledTexts, advance: Advance) -> None:
        """Raises ModelError, with the job's last lines, if the job fails."""
        validation = self._setup.validation
        draw = np.random.default_rng(self._setup.course.seed)
        shuffled, watched = draw.permutation(rows.users), draw.permutation(validation.users)
        with tempfile.TemporaryDirectory(prefix="plora-shuffled-") as name:
            folder = Path(name)
            learnt = set(rows.labels) if self._setup.labels.task == "classification" else None
            lines = [*_lines("train", shuffled, rows), *_lines("validation", watched, validation, learnt)]
            (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
            (folder / "settings.yaml").write_text(yaml.safe_dump(self._settings(folder)), encoding="utf-8")
            _train(folder)
            store = AdapterStore.open(str(folder / "store"))
            self._loaded = load_generation(store, device=self._setup.device.type)
            self._shared = shared_numbers(self._loaded)
            keys = {int(user): store.key(_name(user)) for user in np.unique(shuffled)}
            found = self._loaded.reader.get_many(list(keys.values()))
            self._vectors = {user: torch.tensor(found[key].record) for user, key in keys.items() if key in found}
        advance(len(rows.texts) * self._setup.course.epochs)

    def meet(self, rows: LabelledTexts, advance: Advance) -> None:
        """New users are shuffled among their rows as well."""
        users, draw = np.unique(rows.users), np.random.default_rng(self._setup.course.seed)
        shuffled = replace(rows, users=draw.permutation(rows.users))
        fitter = FewShotFitter(self._fitted, batch_tokens=self._setup.course.batch_tokens)
        given = [shuffled.of(user) for user in users]
        fits = fitter.fit_many([Examples(list(own.texts), list(own.labels)) for own in given])
        self._newcomers = {int(user): torch.from_numpy(fit.vector) for user, fit in zip(users, fits, strict=True)}
        advance(len(rows.texts))

    def logits(self, users: Ints, texts: Sequence[str]) -> NDArray[np.float32]:
        model = self._fitted.model
        nobody, own = model.population_vector().cpu(), {**self._vectors, **self._newcomers}
        vectors = torch.stack([own.get(int(user), nobody) for user in users]).to(self._setup.device)

        def forward(input_ids: Tensor, mask: Tensor, places: Ints) -> Tensor:
            return model(input_ids.to(self._setup.device), mask.to(self._setup.device), vectors[torch.from_numpy(places)])

        course = self._setup.course
        logits = answers(
            forward, self._setup.encode(texts), pad_id=self._setup.pad_id, batch_tokens=course.batch_tokens, batch_rows=course.batch_rows
        )
        return in_terms_of(self._setup.labels, logits, self._fitted.labels)

    def size(self) -> Size:
        width = self._fitted.model.user_width
        return Size(width, self._shared + width * len(self._vectors))

    @property
    def _fitted(self) -> LoadedGeneration:
        assert self._loaded is not None, "fit() comes first"
        return self._loaded

    def _settings(self, folder: Path) -> dict[str, Any]:
        settings = self._setup.settings
        kept = settings.model_dump(mode="json", include={"task", "model", "adapter", "training"}, exclude_unset=True)
        training = {name: value for name, value in kept.get("training", {}).items() if name not in LEFT_OUT}
        data = {"source": str(folder / "rows.jsonl"), "max_text_chars": settings.data.max_text_chars}
        return {**kept, "training": training, "data": data, "store": {"uri": str(folder / "store")}}


def in_terms_of(wanted: LabelSpace, logits: NDArray[np.float32], given: LabelSpace) -> NDArray[np.float32]:
    """Outputs [rows, outputs] of a job that found its labels itself, as outputs of `wanted`: it may lack a class, or scale otherwise."""
    if wanted.task == "regression":
        return ((logits * given.std + given.mean - wanted.mean) / wanted.std).astype(np.float32)
    found = np.full((len(logits), wanted.outputs), UNKNOWN_LOGIT, np.float32)
    found[:, [wanted.classes.index(name) for name in given.classes]] = logits - logits.max(axis=1, keepdims=True)
    return found


def _lines(split: str, users: Ints, rows: LabelledTexts, allowed: set[str | float] | None = None) -> Iterator[str]:
    """JSON lines of rows, those with other labels than the allowed ones left out; None: none are."""
    for user, text, label in zip(users, rows.texts, rows.labels, strict=True):
        if allowed is not None and label not in allowed:
            continue
        yield json.dumps({"user_id": _name(user), "text": text, "label": label, "split": split})


def _name(user: int) -> str:
    return f"user-{user}"


def _train(folder: Path) -> None:
    command = [sys.executable, *COMMAND, "--config", str(folder / "settings.yaml")]
    with (folder / "job.log").open("w+", encoding="utf-8") as log:
        with subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as job:
            try:
                code = job.wait()
            except BaseException:  # also the end of the command that evaluates: the job ends with it
                job.terminate()
                raise
        log.seek(0)
        last = " / ".join(line.strip() for line in log.read().splitlines()[-3:])
    if code:
        raise ModelError(f"baseline shuffled-users: its training job failed: {last}")
