"""How much of everything so many users need: memory, replicas, GPUs, objects, time and money, reckoned from measured figures.

Pure arithmetic over figures.yaml and models.yaml; reads no store, starts nothing. The command is `plora plan`.
"""

from plora_ray.sizing.demand import Demand, ModelShape, known_models
from plora_ray.sizing.figures import Figures, load_figures
from plora_ray.sizing.plan import Plan, make_plan
from plora_ray.sizing.prices import MonthlyCost, Prices, load_prices, monthly_cost

__all__ = [
    "Demand", "Figures", "ModelShape", "MonthlyCost", "Plan", "Prices", "known_models", "load_figures", "load_prices", "make_plan",
    "monthly_cost",
]  # fmt: skip
