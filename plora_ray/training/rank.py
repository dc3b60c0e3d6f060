"""What one rank of the job does, from its partitions to its last wave. Needs a process group; knows nothing of Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from plora_ray.adapters.blocks import checkpoint_blocks
from plora_ray.adapters.calibration import Calibration
from plora_ray.adapters.centring import centred
from plora_ray.adapters.fit import UserPrior
from plora_ray.adapters.halves import Halves
from plora_ray.adapters.labels import LabelSpace
from plora_ray.adapters.model import PersonalizedModel
from plora_ray.adapters.objective import PopulationObjective
from plora_ray.adapters.pretrained import DTYPES, load_tokenizer
from plora_ray.config import Settings, TrainingSettings
from plora_ray.data.partition import read_partition
from plora_ray.opening import open_store
from plora_ray.store import AdapterStore, GenerationReader
from plora_ray.training.activations import Below, LowerActivations, whole_passes
from plora_ray.training.calibration import calibrate
from plora_ray.training.checkpoints import PopulationCheckpoints
from plora_ray.training.engine import EngineOptions, ShardedTrainer, agree_on_sharding, choose_sharding
from plora_ray.training.fitters import AdamFitter, NewtonFitter, WaveFitter
from plora_ray.training.passes import FrozenPasses
from plora_ray.training.plan import PartitionPlan
from plora_ray.training.population import PopulationStage, StepsDone
from plora_ray.training.prior import estimate_prior, prior_as_trained
from plora_ray.training.rank_rows import RankRows
from plora_ray.training.run_state import RunState
from plora_ray.training.user_stage import UserStage, WaveDone
from plora_ray.training.user_table import UserTable
from plora_ray.training.wave_users import WaveUsers
from plora_ray.training.waves import Wave, owned_partitions

Found = TypeVar("Found")

USERS_AT_ONCE = 4096  # whose records are read from the base in one go


@dataclass(frozen=True)
class ModelHeld:
    """How the model lies on the ranks. parameter_bytes: of all of it; parameter_bytes_held: in this rank's memory."""

    sharding: str
    ranks: int
    parameter_bytes: int
    parameter_bytes_held: int


class Observer(Protocol):
    """Who hears of a rank's progress."""

    def on_model(self, model: ModelHeld) -> None: ...
    def on_steps(self, done: StepsDone) -> None: ...
    def on_wave(self, done: WaveDone) -> None: ...

    def in_step(self) -> None:
        """Called by all ranks equally often, after the same piece of work: an epoch, or everything."""


@dataclass(frozen=True)
class Assignment:
    """All that the ranks of one run share. partitions_uri: where the partition files lie. base: the generation to start from.

    deepspeed_profile: the content of the file of that name, for EngineOptions.
    """

    settings: Settings
    fingerprint: str
    generation: str
    labels: LabelSpace
    partitions_uri: str
    waves: list[Wave]
    deepspeed_profile: dict[str, Any] = field(default_factory=dict)
    base: str | None = None


def run_rank(assignment: Assignment, rank: int, ranks: int, observer: Observer) -> None:
    """Both stages of this rank's share. Every rank of the group must call; safe to call again after any failure."""
    with ExitStack() as resources:
        _run_stages(assignment, rank, ranks, observer, resources)


def _run_stages(assignment: Assignment, rank: int, ranks: int, observer: Observer, resources: ExitStack) -> None:
    settings = assignment.settings
    store = open_store(settings.store, retry_s=settings.training.store_retry_s)
    run = RunState(store.objects, assignment.fingerprint)
    owned = owned_partitions(settings.training.partition_count, rank, ranks)
    plans = {partition: run.plan.load_partition(partition) for partition in owned}
    rows = _load_rows(assignment, store, plans)
    trainer, model, halves = _build(assignment, observer)
    below = resources.enter_context(_below(settings.training, halves, trainer, rows))
    base = store.open_generation(assignment.base) if assignment.base is not None else None
    writer = store.resume(assignment.generation)
    if base is not None:
        trainer.load(model.completed({name: tensor for name, tensor in base.shared().tensors.items() if name in trainer.trained}))
    if base is not None and settings.training.only_users_with_new_data:
        shared = trainer.gathered()
        trainer.freeze()
        prior = UserPrior.from_tensors(base.shared().tensors) if settings.adapter.kind == "plora" else None
    else:
        table = _table(settings, len(rows.keys))
        if base is not None and table is not None:
            start_at(base, rows.keys, table)
        checkpoints = PopulationCheckpoints(store.objects, run.folder, rank)
        PopulationStage(trainer, rows, table, settings.training, rank, checkpoints, observer.on_steps, observer.in_step, below).run()
        shared, prior = _settled(settings, run, trainer, _passes(settings.training, trainer, model, rows, below), rows, table)
        if rank == 0:
            writer.write_shared({**shared, **(prior.tensors() if prior else {})}, {"format": "pt"})
    passes = _passes(settings.training, trainer, model, rows, below)  # anew: what others keep may be of parameters that moved since
    finished: list[set[int]] = [set(writer.finished_waves()) if rank == 0 else set()]
    dist.broadcast_object_list(finished, src=0)
    fitter, users = _fitter(settings, passes, rows, model, shared, prior), WaveUsers(plans, base, writer)
    stage = UserStage(fitter, passes, rows, settings.task, users, run, observer.on_wave, lambda: store.tombstones().keys())
    stage.fit_waves([wave for wave in assignment.waves if wave.partition in plans], finished[0], _in_step(trainer))
    dist.barrier()
    observer.in_step()


def _passes(training: TrainingSettings, trainer: ShardedTrainer, model: PersonalizedModel, rows: RankRows, below: Below) -> FrozenPasses:
    return FrozenPasses(trainer, model, rows, batch_tokens=training.batch_tokens, batch_rows=training.batch_rows, below=below)


def _table(settings: Settings, users: int) -> UserTable | None:
    """The user vectors that the population stage learns; private matrices begin only after it."""
    if settings.adapter.kind == "lora":
        return None
    training = settings.training
    rate, decay = training.user_learning_rate, training.user_weight_decay
    return UserTable(users, settings.adapter.user_dim, learning_rate=rate, weight_decay=decay)


def start_at(base: GenerationReader, user_keys: np.ndarray, table: UserTable) -> None:
    """A warm start: users whom the base knows begin at their vectors in it. user_keys: uint8 [users, 16] of the table's rows."""
    keys = [key.tobytes() for key in user_keys]
    for start in range(0, len(keys), USERS_AT_ONCE):
        found = base.get_many(keys[start : start + USERS_AT_ONCE])
        for place, key in enumerate(keys[start : start + USERS_AT_ONCE], start):
            if key in found:
                table.vectors[place] = torch.from_numpy(found[key].record.copy())


def _load_rows(assignment: Assignment, store: AdapterStore, plans: dict[int, PartitionPlan]) -> RankRows:
    """The rows of the rank's partitions; where only some users are fitted, theirs alone."""
    settings = assignment.settings
    options, retry_s = settings.store.storage_options(), settings.training.store_retry_s
    tables = {index: read_partition(assignment.partitions_uri, index, options, retry_s=retry_s) for index in plans}
    if settings.training.only_users_with_new_data:
        tables = {index: table.of_users(plans[index].fits(table.keys)) for index, table in tables.items()}
    pad_id = load_tokenizer(settings.model.name).pad_token_id
    return RankRows(tables, assignment.labels, frozenset(store.tombstones()), pad_id or 0, fit_validation=settings.training.fit_validation)


def _build(assignment: Assignment, observer: Observer) -> tuple[ShardedTrainer, PersonalizedModel, Halves | None]:
    """The engine, its model, and the model's halves if hidden states below the adapters are to be kept."""
    settings = assignment.settings
    torch.manual_seed(settings.training.seed)  # equal starting parameters on all ranks
    model = PersonalizedModel.from_pretrained(settings.adapter_spec(assignment.labels.outputs), dtype=DTYPES[settings.model.dtype])
    training = settings.training
    if training.gradient_checkpointing:
        checkpoint_blocks(model.plm, model.context)
    keeps = training.activation_cache_mb + training.activation_disk_mb > 0
    halves = Halves(model.plm, settings.adapter.top_layers) if settings.adapter.top_layers and keeps else None
    objective = PopulationObjective(model, user_dropout=training.user_dropout, mutual_information=training.mutual_information.build())
    parameter_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    options = EngineOptions(
        agree_on_sharding(choose_sharding(training.sharding, parameter_bytes, training.offload)), training.offload,
        None if training.offload_dir is None else str(training.offload_dir), assignment.deepspeed_profile,
    )  # fmt: skip
    trainer = ShardedTrainer(
        objective, model.shared_parameters(), options=options, learning_rate=training.learning_rate,
        weight_decay=training.weight_decay, gradient_clipping=training.gradient_clipping, batch_rows=training.batch_rows,
    )  # fmt: skip
    observer.on_model(ModelHeld(options.sharding, dist.get_world_size(), parameter_bytes, trainer.parameter_bytes_held()))
    return trainer, model, halves


@contextmanager
def _below(training: TrainingSettings, halves: Halves | None, trainer: ShardedTrainer, rows: RankRows) -> Iterator[Below]:
    if halves is None:
        yield whole_passes
        return
    kept = LowerActivations(
        halves, trainer, rows, memory_bytes=training.activation_cache_mb * 2**20, disk_bytes=training.activation_disk_mb * 2**20
    )
    with closing(kept):
        yield kept.under


def _settled(
    settings: Settings, run: RunState, trainer: ShardedTrainer, passes: FrozenPasses, rows: RankRows, table: UserTable | None
) -> tuple[dict[str, Tensor], UserPrior | None]:
    """What all users share, as it stays from here on, and their prior (kind plora): calibrated, and with the average user at zero.

    What is found over all ranks' rows is found once a run: all waves are fitted under the same.
    """
    shared = trainer.gathered()
    trainer.freeze()
    if settings.training.calibrate and settings.task == "classification":

        def calibrated() -> Calibration:
            return calibrate(passes, rows, None if table is None else prior_as_trained(table, rows).mean)

        shared = _once(run.load_calibration, calibrated, run.save_calibration).of_shared(shared)
        trainer.load(shared)
    if table is None:
        return shared, None
    prior = _once(run.load_prior, lambda: estimate_prior(table, passes, rows, settings.task), run.save_prior)
    shared = centred(shared, prior.mean)
    trainer.load(shared)
    return shared, prior.centred()


def _once(load: Callable[[], Found | None], find: Callable[[], Found], save: Callable[[Found], None]) -> Found:
    """What the first rank finds kept; else what all ranks find together, and it keeps."""
    kept: list[Found | None] = [load() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(kept, src=0)
    if kept[0] is not None:
        return kept[0]
    found = find()
    if dist.get_rank() == 0:
        save(found)
    return found


def _fitter(
    settings: Settings, passes: FrozenPasses, rows: RankRows, model: PersonalizedModel, shared: dict[str, Tensor], prior: UserPrior | None
) -> WaveFitter:
    """The solver that the settings choose; private matrices have no prior and are pulled towards the population's."""
    fit = settings.user_fit()
    if prior is None:
        return AdamFitter(passes, rows, model.population_vector(shared), fit.pull, fit.steps, settings.task)
    if fit.solver == "newton":
        return NewtonFitter(passes, rows, prior, settings.task, guard=fit.guard)
    return AdamFitter(passes, rows, prior.mean, prior.precision * prior.noise_variance, fit.steps, settings.task)


def _in_step(trainer: ShardedTrainer) -> Callable[[list[Wave | None]], list[Wave | None]]:
    return lambda waves: [wave for wave, _, _ in trainer.lockstep(waves, None)]
