"""From what is asked for to how much of everything. Every line is arithmetic; a figure that isn't asked for comes from figures.yaml."""

from __future__ import annotations

import math
from dataclasses import dataclass

from plora_ray.adapters.fit_memory import fit_memory_bytes
from plora_ray.data.sources import LEAST_PARTITIONS, MOST_PARTITIONS, ROWS_PER_PARTITION
from plora_ray.sizing.demand import Demand
from plora_ray.sizing.figures import Figures
from plora_ray.training.memory import MAX_USERS_PER_WAVE, SEGMENT_COPIES

FLOAT32_BYTES = 4
ROW_DIGEST_BYTES = 32  # key and digest of a user beside each segment
ROOM_FOR_FRESH = 1.125  # of the records, so that fresh adapters find a place beside them
CACHE_ENTRY_BYTES = 512  # what a user costs beside the record where not all are resident
GENERATIONS_KEPT = 3  # `plora generations gc` keeps as many
ENGINES_AT_A_SWAP = 2  # a replica loads a new generation, users and all, beside the one that serves
RAY_NODE_BYTES = 2 * 2**30  # raylet, agents, HAProxy and logs beside the replica
OTHER_OBJECTS = 6  # shared weights, manifest, beginning, two reports, the store's own
WAVE_MEMORY_BYTES = 2**30
OUTPUTS = 2
PASS_ROWS = 32
GiB = 2**30


@dataclass(frozen=True)
class Plan:
    """replicas are Predictors; a worker pod for each and one for the Personalizer. peak_cores: busy when `rps` texts a second come.

    cached_share: of the users, whose adapters fit a replica's memory; all are resident if their records fit the limit.
    generation_bytes: of one in the store; storage_bytes: of all kept. objects: of a generation, at most.
    gpus: so many finish a run within the hours that it may take; run_hours: with them. core_hours: of the same run on CPUs.
    pod_memory_bytes: of a replica and of the Ray node around it.
    """

    record_bytes: int
    generation_bytes: int
    storage_bytes: int
    objects: int
    publish_s: float
    open_s: float
    peak_cores: float
    replicas: int
    replica_cpus: int
    replica_memory_bytes: int
    cache_bytes: int
    cached_share: float
    gpus: int
    run_hours: float
    core_hours: float

    @property
    def worker_pods(self) -> int:
        return self.replicas + 1

    @property
    def pod_memory_bytes(self) -> int:
        return self.replica_memory_bytes + RAY_NODE_BYTES


def make_plan(demand: Demand, figures: Figures) -> Plan:
    """Raises ConfigError for private matrices in a model of unknown shape."""
    record = FLOAT32_BYTES * demand.width
    generation = demand.users * (record + round(figures.stored_overhead_bytes_per_user.value) + ROW_DIGEST_BYTES)
    peak_cores = demand.rps * _scaled(figures.core_s_per_answer.value, demand, figures)
    records = demand.users * record
    is_resident = records <= demand.cache_limit_bytes
    cache = min(round(ROOM_FOR_FRESH * records), demand.cache_limit_bytes)
    weights = FLOAT32_BYTES * demand.model.parameters
    index = demand.users * figures.index_bytes_per_user.value
    population = demand.rows * demand.epochs * _scaled(figures.core_s_per_population_row.value, demand, figures)
    fitting = demand.rows * _scaled(figures.core_s_per_fitted_row.value, demand, figures)
    core_hours = (population + fitting) / 3600
    gpus = math.ceil(core_hours / figures.cores_per_gpu.value / demand.train_hours)
    return Plan(
        record_bytes=record,
        generation_bytes=generation,
        storage_bytes=GENERATIONS_KEPT * (generation + weights),
        objects=2 * waves(demand) + OTHER_OBJECTS,
        publish_s=max(demand.users / figures.published_users_per_s.value, generation / figures.published_bytes_per_s.value),
        open_s=demand.users / 1e6 * figures.open_s_per_million_users.value,
        peak_cores=peak_cores,
        replicas=max(2, math.ceil(peak_cores / figures.busy_share.value / demand.replica_cpus)),  # two: one may be lost
        replica_cpus=demand.replica_cpus,
        replica_memory_bytes=math.ceil(figures.replica_process_bytes.value + ENGINES_AT_A_SWAP * (weights + index + cache)),
        cache_bytes=cache,
        cached_share=1.0 if is_resident else cache / (demand.users * (record + CACHE_ENTRY_BYTES)),
        gpus=gpus,
        run_hours=core_hours / figures.cores_per_gpu.value / gpus,
        core_hours=core_hours,
    )


def _scaled(core_s: float, demand: Demand, figures: Figures) -> float:
    """Core seconds of a row of this demand's: as tokens times block parameters, which is what a forward pass's arithmetic grows with."""
    reference = figures.reference_tokens * figures.reference_block_parameters
    return core_s * demand.tokens * demand.model.block_parameters / reference


def waves(demand: Demand) -> int:
    """Most segments of a generation: each partition's users are cut into waves that fit the limits, and the last one isn't full."""
    partitions = min(max(math.ceil(demand.rows / ROWS_PER_PARTITION), LEAST_PARTITIONS), MOST_PARTITIONS)
    return partitions + demand.users // users_per_wave(demand)


def users_per_wave(demand: Demand) -> int:
    """Most users whose fit and segment fit into the default memory of a wave."""
    low, high = 1, MAX_USERS_PER_WAVE
    while low < high:
        middle = (low + high + 1) // 2
        fit = fit_memory_bytes(
            "newton" if demand.kind == "plora" else "adam", users=middle, rows=middle * demand.rows_per_user, width=demand.width,
            outputs=OUTPUTS, pass_users=PASS_ROWS,
        )  # fmt: skip
        low, high = (
            (middle, high) if fit + SEGMENT_COPIES * FLOAT32_BYTES * demand.width * middle <= WAVE_MEMORY_BYTES else (low, middle - 1)
        )
    return low
