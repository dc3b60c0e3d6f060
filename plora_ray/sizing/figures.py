"""Measured figures with where each comes from. figures.yaml holds them; nothing here reckons."""

from __future__ import annotations

from importlib.resources import files

import yaml
from pydantic import BaseModel, ConfigDict, Field

from plora_ray.errors import ConfigError


class Figure(BaseModel):
    """source: the command that measured it, and where. measured False: an assumption, and source says which; tables mark it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    value: float = Field(gt=0)
    source: str = Field(min_length=1)
    measured: bool = True


class Figures(BaseModel):
    """Times are seconds of one CPU core for one row of `reference_tokens` tokens through blocks of `reference_block_parameters`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    reference_tokens: int = Field(ge=1)
    reference_block_parameters: int = Field(ge=1)
    core_s_per_answer: Figure
    core_s_per_population_row: Figure
    core_s_per_fitted_row: Figure
    cores_per_gpu: Figure
    replica_process_bytes: Figure
    index_bytes_per_user: Figure
    stored_overhead_bytes_per_user: Figure
    published_users_per_s: Figure
    published_bytes_per_s: Figure
    open_s_per_million_users: Figure
    busy_share: Figure


def load_figures(cores_per_gpu: float | None = None) -> Figures:
    """The figures that come with the package, with the reader's own measurement of a GPU if there is one. Raises ConfigError."""
    values = yaml.safe_load(files(__package__).joinpath("figures.yaml").read_text(encoding="utf-8"))
    if cores_per_gpu is not None:
        if not cores_per_gpu > 0:
            raise ConfigError(f"--cores-per-gpu is {cores_per_gpu:g}: give a number above 0")
        values["cores_per_gpu"] = {"value": cores_per_gpu, "source": "given with --cores-per-gpu"}
    return Figures.model_validate(values)
