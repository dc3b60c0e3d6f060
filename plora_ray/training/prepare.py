"""A run made ready: its data partitioned, its labels known, its waves planned. Everything that can be refused is refused here."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from plora_ray.adapters.labels import LabelSpace
from plora_ray.adapters.pretrained import load_tokenizer, resolve_model, weight_hash
from plora_ray.config import Settings
from plora_ray.data.partition import partition_rows
from plora_ray.data.sources import fingerprint, list_units, suggest_partitions
from plora_ray.data.stats import PartitionStats, label_space
from plora_ray.data.trained_users import TrainedUsers, read_trained_users
from plora_ray.data.units import ReadUnit
from plora_ray.errors import ConfigError, StoreError
from plora_ray.opening import UNENCRYPTED, open_store
from plora_ray.store import AdapterStore
from plora_ray.store.retries import retrying
from plora_ray.training.carry_over import ANEW, Base, plan_new_data
from plora_ray.training.deepspeed_profile import read_profile
from plora_ray.training.engine import require_offload
from plora_ray.training.memory import MAX_USERS_PER_WAVE, ModelSize, wave_bytes
from plora_ray.training.plan import PartitionPlan, Plan, PlanBuilder
from plora_ray.training.progress import ProgressLine
from plora_ray.training.rank import Assignment
from plora_ray.training.run_state import RunState, run_fingerprint
from plora_ray.training.runs import end_runs_of
from plora_ray.training.telemetry.configured import check_telemetry
from plora_ray.training.waves import MiB, WaveLimits


@dataclass(frozen=True)
class Prepared:
    """A run whose data is partitioned and planned. base: the generation it starts from, if any."""

    store: AdapterStore
    run: RunState
    assignment: Assignment
    stats: PartitionStats
    weight_hash: str
    size: ModelSize
    plan: Plan
    base: Base | None

    @property
    def nothing_to_do(self) -> bool:
        """Whether the base says everything already: no user has new rows, and no fresh adapter waits to be taken in."""
        carrying = self.assignment.settings.training.only_users_with_new_data
        return carrying and not self.plan.fitted and not self.plan.folded


def prepare(settings: Settings, line: ProgressLine, *, dry_run: bool = False) -> Prepared:
    """Open the store, find or begin the run, partition and plan; no worker has started yet. Raises PloraError.

    With dry_run the plan isn't kept: the run that follows makes its own, of what stands in the store by then.
    """
    check_telemetry(settings.training)
    profile = (
        {} if settings.training.deepspeed_profile is None else read_profile(settings.training.deepspeed_profile, settings.training.offload)
    )
    require_offload(settings.training.offload)
    weights = weight_hash(settings.model.name)
    load_tokenizer(settings.model.name)
    retry_s = settings.training.store_retry_s
    units = retrying(retry_s)(list_units, settings.data)
    settings = _with_partitions(settings, units)
    store = open_store(settings.store, create=True, retry_s=retry_s)
    store.objects.probe()
    training = settings.training
    run, base = _run_and_base(settings, store, fingerprint(settings.data, units), weights)
    head, resumed = run.begin(base.reader.generation if base is not None else None)
    generation, based_on = head.generation, head.base
    line.say(f"generation {generation} ({'resuming' if resumed else 'new'}) in {store.uri}")
    if not store.encrypted:
        line.say(UNENCRYPTED)
    line.say(f"partitioning {settings.data.shown} by user ...")
    uri = store.objects.uri_of(f"{run.folder}/partitions")
    stats = partition_rows(
        settings.data, settings.task, uri, training.partition_count, store.hash_secret, resolve_model(settings.model.name),
        settings.model.max_length, progress=line.show_partitioning,
        storage_options=settings.store.storage_options(), units=units, retry_s=retry_s,
    )  # fmt: skip
    labels = _labels(settings, stats, base)
    size = ModelSize.of(settings, labels.outputs)
    limits = _limits(settings, labels, size)
    if not dry_run and store.manifest(generation) is None:
        store.begin(generation, settings.adapter.kind)  # before the plan: fresh adapters that it can't know are newer than this
    plan = run.plan.load() or _plan(settings, store, run, uri, base, limits, keep=not dry_run)
    skipped = f", {sum(stats.skipped.values()):,} bad rows skipped" if stats.skipped else ""
    line.say(plan.describe() + skipped)
    if plan.without_digests:
        line.say(f"generation {based_on} doesn't say what {plan.without_digests:,} users in the data were trained on: they are refitted")
    assignment = Assignment(
        _absolute(settings, store), run.folder.rpartition("/")[2], generation, labels, uri, plan.waves, profile, based_on
    )  # fmt: skip
    return Prepared(store, run, assignment, stats, weights, size, plan, base)


def _run_and_base(settings: Settings, store: AdapterStore, data: str, weights: str) -> tuple[RunState, Base | None]:
    """The run of these settings and data (a fingerprint), and the generation it starts from: the current one when it was begun."""
    if settings.training.only_users_with_new_data:
        base = Base.open(store, settings, weights)
        end_runs_of(store.objects, base.reader.manifest)
        return RunState(store.objects, run_fingerprint(settings, data, weights, base.reader.generation)), base
    run = RunState(store.objects, run_fingerprint(settings, data, weights))
    if not settings.training.warm_start:
        return run, None
    head = run.head()
    return run, Base.open(store, settings, weights, None if head is None else head.base)


def _plan(
    settings: Settings, store: AdapterStore, run: RunState, uri: str, base: Base | None, limits: WaveLimits, *, keep: bool
) -> Plan:  # fmt: skip
    training = settings.training

    def trained_users(partition: int) -> TrainedUsers:
        return read_trained_users(uri, partition, settings.store.storage_options(), retry_s=training.store_retry_s)

    def save(partition: int, plan: PartitionPlan) -> None:
        if keep:
            run.plan.save_partition(partition, plan)

    if base is not None and training.only_users_with_new_data:
        plan, snapshot = plan_new_data(store, base, trained_users, training.partition_count, limits, save)
        seen = snapshot.seen
    else:
        builder, seen = PlanBuilder(limits), np.empty(0, np.uint64)
        for partition in range(training.partition_count):
            everybody = PartitionPlan.fit_all(trained_users(partition))
            save(partition, everybody)
            builder.add(partition, everybody)
        plan = builder.build(base.reader.generation if base is not None else None)
    return run.plan.save(plan, seen) if keep else plan


def _limits(settings: Settings, labels: LabelSpace, size: ModelSize) -> WaveLimits:
    training = settings.training
    users = MAX_USERS_PER_WAVE if training.users_per_wave == "auto" else training.users_per_wave
    return WaveLimits(users, training.wave_memory_mb * MiB, wave_bytes(settings, labels.outputs, size.user_width))


def _with_partitions(settings: Settings, units: list[ReadUnit]) -> Settings:
    """The settings with `auto` partitions resolved. Raises ConfigError if there are more workers than partitions to own."""
    training = settings.training
    partitions = suggest_partitions(units) if training.partitions == "auto" else training.partitions
    most = training.num_workers[1] if isinstance(training.num_workers, tuple) else training.num_workers
    if most != "auto" and most > partitions:
        raise ConfigError(f"training.num_workers is {most}, but these rows make {partitions} partitions: set training.partitions to more")
    return settings.model_copy(update={"training": training.model_copy(update={"partitions": partitions})})


def _absolute(settings: Settings, store: AdapterStore) -> Settings:
    """The settings with a store URI that means the same in every worker's working directory."""
    return settings.model_copy(update={"store": settings.store.model_copy(update={"uri": store.uri})})


def _labels(settings: Settings, stats: PartitionStats, base: Base | None) -> LabelSpace:
    """What the outputs mean: from the data, or from the base, whose head stays. Raises StoreError or DataError if the two disagree."""
    if base is not None and settings.training.only_users_with_new_data:
        base.refuse_new_labels(stats)
        return base.labels
    if settings.task == "classification":
        labels = LabelSpace("classification", tuple(label_space(stats, settings.task)))
        if base is not None and labels != base.labels:
            raise StoreError(f"generation {base.reader.generation} has other classes than the data, so it can't be started from: {ANEW}")
        return labels
    mean, std = stats.label_moments()
    return LabelSpace("regression", mean=mean, std=std or 1.0)
