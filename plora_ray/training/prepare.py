"""A run made ready: its data partitioned, its labels known, its waves planned. Everything that can be refused is refused here."""

from __future__ import annotations

from dataclasses import dataclass

from plora_ray.adapters.labels import LabelSpace
from plora_ray.adapters.pretrained import load_tokenizer, resolve_model, weight_hash
from plora_ray.config import Settings
from plora_ray.data.partition import partition_rows
from plora_ray.data.sources import ReadUnit, fingerprint, list_units, suggest_partitions
from plora_ray.data.stats import PartitionStats, label_space
from plora_ray.errors import ConfigError
from plora_ray.store import AdapterStore
from plora_ray.store.retries import retrying
from plora_ray.training.engine import read_profile, require_offload
from plora_ray.training.progress import ProgressLine
from plora_ray.training.rank import Assignment
from plora_ray.training.run_state import RunState, run_fingerprint
from plora_ray.training.telemetry.configured import check_telemetry
from plora_ray.training.waves import plan_waves


@dataclass(frozen=True)
class Prepared:
    """A run whose data is partitioned and planned."""

    store: AdapterStore
    run: RunState
    assignment: Assignment
    stats: PartitionStats
    weight_hash: str


def prepare(settings: Settings, line: ProgressLine) -> Prepared:
    """Open the store, find or begin the run, partition and plan; no worker has started yet. Raises PloraError."""
    check_telemetry(settings.training)
    profile = {} if settings.training.deepspeed_profile is None else read_profile(settings.training.deepspeed_profile)
    require_offload(settings.training.offload)
    weights = weight_hash(settings.model.name)
    load_tokenizer(settings.model.name)
    retry_s = settings.training.store_retry_s
    units = retrying(retry_s)(list_units, settings.data)
    settings = _with_partitions(settings, units)
    store = AdapterStore.open(settings.store.uri, settings.store.storage_options(), create=True, retry_s=retry_s)
    store.objects.probe()
    run = RunState(store.objects, run_fingerprint(settings, fingerprint(settings.data, units), weights))
    generation, resumed = run.begin()
    line.say(f"generation {generation} ({'resuming' if resumed else 'new'}) in {store.uri}")
    line.say(f"partitioning {settings.data.source} by user ...")
    uri = store.objects.uri_of(f"{run.folder}/partitions")
    stats = partition_rows(
        settings.data, settings.task, uri, settings.training.partition_count, store.hash_secret, resolve_model(settings.model.name),
        settings.model.max_length, settings.training.seed, progress=line.show_partitioning,
        storage_options=settings.store.storage_options(), units=units, retry_s=retry_s,
    )  # fmt: skip
    labels = _labels(settings, stats)
    waves = plan_waves({index: part.train_users for index, part in enumerate(stats.partitions)}, settings.training.users_per_wave)
    skipped = f", {sum(stats.skipped.values()):,} bad rows skipped" if stats.skipped else ""
    line.say(f"{stats.train_users:,} users to train, {stats.rows('train'):,} training rows, {len(waves)} waves{skipped}")
    assignment = Assignment(_absolute(settings, store), run.folder.rpartition("/")[2], generation, labels, uri, waves, profile)
    return Prepared(store, run, assignment, stats, weights)


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


def _labels(settings: Settings, stats: PartitionStats) -> LabelSpace:
    if settings.task == "classification":
        return LabelSpace("classification", tuple(label_space(stats, settings.task)))
    mean, std = stats.label_moments()
    return LabelSpace("regression", mean=mean, std=std or 1.0)
