"""How a job trains: ranks, both stages, solvers, and what watches it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from plora_ray.adapters.objective import MutualInformation
from plora_ray.config.section import Section
from plora_ray.data.locations import holds_credentials


class MutualInformationSettings(Section):
    weight: float = Field(0.0, ge=0)
    temperature: float = Field(4.0, gt=0)
    layer_term: bool = True
    logit_term: bool = True
    detach_population: bool = True

    def build(self) -> MutualInformation:
        return MutualInformation(**self.model_dump())


class AdamSettings(Section):
    """The per-user Adam (training.user_solver adam), in the user stage and in few-shot fits.

    epochs: passes over a user's rows. learning_rate: of a user's first step. None takes the kind's own. rows_per_step: of one user.
    patience: epochs without a lower loss on the user's validation rows before it stops. pull: for kind lora, the precision lambda of
    the pull towards the population's matrices (plora is pulled by the population's prior).
    """

    epochs: int | None = Field(None, ge=1)
    learning_rate: float | None = Field(None, gt=0)
    rows_per_step: int = Field(16, ge=1)
    patience: int = Field(3, ge=1)
    pull: float = Field(100.0, ge=0)


class MlflowSettings(Section):
    """An MLflow tracking server, or a file: or sqlite: URI of one. Credentials: MLFLOW_TRACKING_USERNAME, _PASSWORD or _TOKEN."""

    tracking_uri: str
    experiment: str = Field("plora", min_length=1)

    @model_validator(mode="after")
    def _no_password(self) -> MlflowSettings:
        if holds_credentials(self.tracking_uri):
            raise ValueError(
                "tracking_uri holds a user name or password: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead"
            )
        return self


class TrainingSettings(Section):
    """Both training stages.

    num_workers: ranks of the job; auto takes a rank a GPU, else up to two CPU ranks; [min, max] follows the cluster, which is
    looked at every resize_check_s seconds. partitions: auto takes one for every ROWS_PER_PARTITION rows. store_retry_s: how long
    the job rides out passing failures of the storage, each time. sharding: zero3 shards the frozen PLM
    over the ranks, replicated keeps a copy on each, auto shards when a copy would take over half of a device's memory.
    user_solver: what fits users once everything shared is frozen; auto takes newton for kind plora, adam for kind lora.
    guard: whether users whom newton's fit harms, by their own rows left out one by one, are left to the population; adam has a guard
    of its own, since it keeps a user's best epoch on validation rows, the start included.
    population_fraction: share of the training rows that an epoch of the population stage meets, drawn anew each epoch.
    calibrate: whether validation rows decide how large the logits of a classification may be, before users are fitted.
    fit_validation: whether newton fits users on their validation rows as well.
    user_dropout: rho. batch_rows / batch_tokens bound a batch. A wave is the unit of resume: at most
    users_per_wave users (auto: 5000), and no more than fit into wave_memory_mb.
    only_users_with_new_data: keep the current generation's shared parameters and refit only users whose rows are new or changed.
    warm_start: train a new population from the current generation's shared parameters and vectors instead of from scratch.
    activate: whether what is published serves at once, or waits for `plora generations canary` or `activate`.
    tensorboard_dir: where the driver writes event files; None: nowhere. mlflow: a server that hears of the run; None: none.
    gradient_checkpointing: blocks run again in the backward pass instead of keeping their activations. offload: where zero3 keeps
    the frozen shards; nvme writes them below offload_dir. deepspeed_profile: JSON file of further DeepSpeed settings.
    activation_cache_mb / activation_disk_mb: MiB a rank may use for hidden states below adapter.top_layers, in memory and on disk.
    """

    num_workers: int | tuple[int, int] | Literal["auto"] = "auto"
    resize_check_s: float = Field(60.0, gt=0)
    use_gpu: bool | Literal["auto"] = "auto"
    sharding: Literal["zero3", "replicated", "auto"] = "auto"
    offload: Literal["none", "cpu", "nvme"] = "none"
    offload_dir: Path | None = None
    gradient_checkpointing: bool = False
    deepspeed_profile: Path | None = None
    activation_cache_mb: int = Field(512, ge=0)
    activation_disk_mb: int = Field(4096, ge=0)
    epochs: int = Field(3, ge=1)
    population_fraction: float = Field(1.0, gt=0, le=1)
    learning_rate: float = Field(1e-3, gt=0)
    user_learning_rate: float = Field(1e-2, gt=0)
    user_weight_decay: float = Field(0.0, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    warmup_fraction: float = Field(0.05, ge=0, lt=1)
    gradient_clipping: float = Field(1.0, gt=0)
    user_dropout: float = Field(0.1, ge=0, le=1)
    mutual_information: MutualInformationSettings = MutualInformationSettings()
    user_solver: Literal["auto", "newton", "adam"] = "auto"
    guard: bool = False
    calibrate: bool = True
    fit_validation: bool = True
    adam: AdamSettings = AdamSettings()
    batch_rows: int = Field(32, ge=1)
    batch_tokens: int = Field(4096, ge=16)
    users_per_wave: int | Literal["auto"] = "auto"
    wave_memory_mb: int = Field(1024, ge=1)
    only_users_with_new_data: bool = False
    warm_start: bool = False
    activate: bool = True
    partitions: Annotated[int, Field(ge=1, le=65536)] | Literal["auto"] = "auto"
    max_failures: int = Field(3, ge=0)
    store_retry_s: float = Field(120.0, ge=0)
    seed: int = Field(0, ge=0)
    tensorboard_dir: Path | None = None
    mlflow: MlflowSettings | None = None

    @field_validator("num_workers", "partitions", "users_per_wave", mode="before")
    @classmethod
    def _numbers_or_auto(cls, value: Any, info: ValidationInfo) -> Any:
        """One sentence for what would else be a complaint from each type that the value isn't."""
        several = info.field_name == "num_workers" and isinstance(value, list | tuple) and len(value) == 2
        if value == "auto" or all(type(item) is int and item > 0 for item in (value if several else [value])):
            return value
        choices = "a number from 1, [min, max] or auto" if info.field_name == "num_workers" else "a number from 1, or auto"
        raise ValueError(f"write {choices}")

    @model_validator(mode="after")
    def _workers(self) -> TrainingSettings:
        if self.num_workers == "auto":
            return self
        low, high = self.num_workers if isinstance(self.num_workers, tuple) else (self.num_workers, self.num_workers)
        if low > high:
            raise ValueError(f"num_workers is {_shown(self.num_workers)}: in [min, max] the larger number comes last")
        if self.partitions != "auto" and high > self.partitions:
            raise ValueError(f"num_workers is {_shown(self.num_workers)}: it must lie between 1 and partitions ({self.partitions})")
        return self

    @model_validator(mode="after")
    def _offloading(self) -> TrainingSettings:
        if self.offload != "none" and self.sharding == "replicated":
            raise ValueError(f"offload is {self.offload}, which needs sharding zero3 or auto: a replicated model has no shards to offload")
        if self.offload == "nvme" and self.offload_dir is None:
            raise ValueError("offload is nvme: set offload_dir to a directory on the drive, there on every node")
        if self.offload != "nvme" and self.offload_dir is not None:
            raise ValueError(f"offload_dir is only used with offload nvme, and offload is {self.offload}")
        return self

    @model_validator(mode="after")
    def _one_way_of_retraining(self) -> TrainingSettings:
        if self.only_users_with_new_data and self.warm_start:
            raise ValueError("warm_start trains a new population and only_users_with_new_data none: set one of them to false")
        return self

    @property
    def partition_count(self) -> int:
        """`partitions` as a number. The job sets it from the source before anything asks."""
        assert self.partitions != "auto"
        return self.partitions


def _shown(workers: int | tuple[int, int]) -> str:
    return str(workers if isinstance(workers, int) else list(workers))
