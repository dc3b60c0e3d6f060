"""The trained baselines by name, and what each needs that may not be installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import partial

from plora_ray.errors import ConfigError
from plora_ray.evaluation.comparison import SHUFFLED
from plora_ray.evaluation.rivals.identifiers import UserIdentifier, with_biases, with_ia3, with_prefix
from plora_ray.evaluation.rivals.lora import LoraPerUser, PopulationLora
from plora_ray.evaluation.rivals.rates import BestRate
from plora_ray.evaluation.rivals.released import AS_RELEASED, ReleasedPlora, end_to_end
from plora_ray.evaluation.rivals.rival import Rival, RivalSetup
from plora_ray.evaluation.rivals.shuffled import ShuffledUsers

POPULATION_LORA, LORA_PER_USER = "population-lora", "lora-per-user"
RELEASED, END_TO_END = "plora-released", "plora-end-to-end"
# What is tuned, and how fast where the population stage's learning rate doesn't suit it: few numbers, each of which must go far.
IDENTIFIERS = {
    "user-identifier-ia3": (with_ia3, 1e-2),
    "user-identifier-bitfit": (with_biases, None),
    "user-identifier-prefix": (with_prefix, 1e-2),
}
RIVALS = (POPULATION_LORA, LORA_PER_USER, *IDENTIFIERS, RELEASED, END_TO_END, SHUFFLED)
AT_ONE_RATE = (RELEASED, SHUFFLED)  # the published settings, and our own method's
NEED_PEFT = (POPULATION_LORA, LORA_PER_USER, "user-identifier-ia3", "user-identifier-prefix")


def check_installed(names: Sequence[str]) -> None:
    """Raises ConfigError for a baseline whose package isn't there."""
    needing = [name for name in names if name in NEED_PEFT]
    if needing and importlib.util.find_spec("peft") is None:
        raise ConfigError(f"baseline {needing[0]} needs PEFT: pip install 'peft>=0.17', or leave it out")


def build_rivals(names: Sequence[str], setup: RivalSetup) -> dict[str, Rival]:
    """Those of RIVALS that `names` has, untrained, in the order of RIVALS; where `evaluation.baseline_rates` has several, at the best."""
    factors = setup.settings.evaluation.baseline_rates
    chosen = [name for name in RIVALS if name in names]
    if len(factors) > 1:
        return {name: _build(name, setup) if name in AT_ONE_RATE else BestRate(partial(_build, name), setup, factors) for name in chosen}
    paced = setup.at(factors[0])
    population = PopulationLora(paced) if {POPULATION_LORA, LORA_PER_USER} & set(chosen) else None
    return {name: _build(name, setup if name in AT_ONE_RATE else paced, population) for name in chosen}


def _build(name: str, setup: RivalSetup, population: PopulationLora | None = None) -> Rival:
    """population: the one to share, where there is one."""
    if name in IDENTIFIERS:
        return UserIdentifier(setup, *IDENTIFIERS[name])
    if name == SHUFFLED:
        return ShuffledUsers(setup)
    if name in (RELEASED, END_TO_END):
        return ReleasedPlora(setup, AS_RELEASED if name == RELEASED else end_to_end(setup))
    population = population or PopulationLora(setup)
    return population if name == POPULATION_LORA else LoraPerUser(setup, population)
