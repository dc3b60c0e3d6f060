"""What is asked for: users, a model, requests. Validated at the door; the defaults are those of the settings."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from plora_ray.adapters.inject import Kind
from plora_ray.config import AdapterSettings, Settings
from plora_ray.errors import ConfigError

ADAPTED_PER_LAYER = 2  # query and value


class ModelShape(BaseModel):
    """A model's size. block_parameters: of the transformer blocks, which every token meets. settings_name: what model.name is set to.

    hidden, layers: 0 where only the number of parameters is known.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    parameters: int = Field(ge=1)
    block_parameters: int = Field(ge=1)
    hidden: int = Field(0, ge=0)
    layers: int = Field(0, ge=0)
    settings_name: str | None = None

    @classmethod
    def named(cls, name: str) -> ModelShape:
        """One of models.yaml. Raises ConfigError that names them."""
        models = known_models()
        if name not in models:
            raise ConfigError(f"the size of model {name!r} isn't known: name one of {', '.join(models)}, or give --parameters")
        return models[name]

    @classmethod
    def counted(cls, parameters: float) -> ModelShape:
        """A model of which nothing else is known: all parameters count as the blocks', an upper bound. Raises ConfigError."""
        try:
            return cls.model_validate({"parameters": parameters, "block_parameters": parameters})
        except ValidationError as error:
            raise ConfigError(_first(error)) from error


def known_models() -> dict[str, ModelShape]:
    """The models of models.yaml by name."""
    text = files(__package__).joinpath("models.yaml").read_text(encoding="utf-8")
    return {name: ModelShape.model_validate(values) for name, values in yaml.safe_load(text).items()}


class Demand(BaseModel):
    """rps: texts to answer a second, at the busiest time. tokens: of a text, on average. train_hours: how long a training run may take.

    runs_per_month: whole training runs. replica_cpus: of a replica. cache_limit_bytes: most memory of a replica for users.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    users: int = Field(ge=1)
    model: ModelShape
    rps: float = Field(gt=0)
    adapter: AdapterSettings = AdapterSettings()
    tokens: int = Field(64, ge=1)
    rows_per_user: int = Field(16, ge=1)
    epochs: int = Field(Settings().training.epochs, ge=1)
    train_hours: float = Field(8.0, gt=0)
    runs_per_month: float = Field(4.0, ge=0)
    replica_cpus: int = Field(4, ge=1)
    cache_limit_bytes: int = Field(8 * 2**30, ge=0)

    @property
    def kind(self) -> Kind:
        return self.adapter.kind

    @property
    def rows(self) -> int:
        """Training rows of all users."""
        return self.users * self.rows_per_user

    @property
    def width(self) -> int:
        """Numbers a user. Raises ConfigError for private matrices in a model of unknown shape."""
        if self.kind == "plora":
            return self.adapter.user_dim
        if not self.model.layers:
            raise ConfigError("private matrices (--kind lora) are as wide as the model's layers: name a --model instead of --parameters")
        layers = min(self.adapter.top_layers or self.model.layers, self.model.layers)
        return self.adapter.rank * layers * ADAPTED_PER_LAYER * 2 * self.model.hidden


def parse_demand(model: str, parameters: float | None, **values: Any) -> Demand:
    """A demand for a model by name, or by its number of parameters if one is given. Raises ConfigError, one line, on anything wrong."""
    shape = ModelShape.named(model) if parameters is None else ModelShape.counted(parameters)
    try:
        return Demand(model=shape, **values)
    except ValidationError as error:
        raise ConfigError(_first(error)) from error


def _first(error: ValidationError) -> str:
    wrong = error.errors()[0]
    return f"--{str(wrong['loc'][-1]).replace('_', '-')}: {wrong['msg']} (got {wrong['input']!r})"
