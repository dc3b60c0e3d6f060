"""What a plan costs a month, at prices that the reader brings: they differ by region, contract and year, so none come with the package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from plora_ray.errors import ConfigError
from plora_ray.sizing.demand import Demand
from plora_ray.sizing.plan import GiB, Plan

HOURS_PER_MONTH = 730


class Prices(BaseModel):
    """Prices in `currency`. requests_per_million: of reads of the store; cold users cost two each."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    currency: str = Field(min_length=1)
    cpu_core_hour: float = Field(ge=0)
    memory_gib_hour: float = Field(ge=0)
    gpu_hour: float = Field(ge=0)
    storage_gib_month: float = Field(ge=0)
    requests_per_million: float = Field(0.0, ge=0)


@dataclass(frozen=True)
class MonthlyCost:
    """In the prices' currency. requests: if every text at the busiest rate were a cold user's who doesn't fit the cache."""

    serving: float
    training: float
    storage: float
    requests: float

    @property
    def total(self) -> float:
        return self.serving + self.training + self.storage + self.requests


def load_prices(path: Path) -> Prices:
    """Read a YAML file of prices. Raises ConfigError, one line."""
    try:
        return Prices.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"cannot read the prices {path}: {error.strerror or error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        wrong = error.errors()[0]
        names = ", ".join(Prices.model_fields)
        raise ConfigError(
            f"{path}: {'.'.join(map(str, wrong['loc'])) or 'prices'}: {wrong['msg']} (a file of prices has {names})"
        ) from error


def monthly_cost(plan: Plan, demand: Demand, prices: Prices) -> MonthlyCost:
    """Replicas all month at full number; GPUs for the runs only."""
    pod_hour = plan.replica_cpus * prices.cpu_core_hour + plan.pod_memory_bytes / GiB * prices.memory_gib_hour
    cold = 2 * demand.rps * (1 - plan.cached_share) * HOURS_PER_MONTH * 3600
    return MonthlyCost(
        serving=HOURS_PER_MONTH * plan.worker_pods * pod_hour,
        training=demand.runs_per_month * plan.gpus * plan.run_hours * prices.gpu_hour,
        storage=plan.storage_bytes / GiB * prices.storage_gib_month,
        requests=cold / 1e6 * prices.requests_per_million,
    )
