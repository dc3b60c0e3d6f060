"""What a million users of the evaluated generation cost a month, at the reader's prices: all reckoning is plora_ray/sizing's."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any, cast

from plora_ray.adapters.blocks import find_blocks
from plora_ray.adapters.model import PersonalizedModel
from plora_ray.config import AdapterSettings, EvaluationSettings
from plora_ray.evaluation.page import table
from plora_ray.sizing import Demand, ModelShape, MonthlyCost, Plan, Prices, load_figures, load_prices, make_plan, monthly_cost

USERS = 1_000_000
GiB = 2**30


@dataclass(frozen=True)
class CostPage:
    """demand: a million users of the generation's model, with rows and tokens as in the data. plan: what they need; cost: at `prices`."""

    demand: Demand
    plan: Plan
    prices: Prices
    cost: MonthlyCost

    @classmethod
    def of(cls, model: PersonalizedModel, settings: EvaluationSettings, *, tokens: float, rows_per_user: float) -> CostPage | None:
        """None without prices. tokens: of a test text, rows_per_user: training rows, both on average. Raises ConfigError for the prices."""
        if settings.prices is None:
            return None
        spec, plm = model.spec, cast(Any, model.plm)
        blocks = find_blocks(plm)[1]
        shape = ModelShape(
            parameters=_numbers(plm), block_parameters=sum(_numbers(block) for block in blocks),
            hidden=int(plm.config.hidden_size), layers=len(blocks),
        )  # fmt: skip
        adapter = AdapterSettings(kind=spec.kind, rank=spec.rank, user_dim=spec.user_dim, top_layers=spec.top_layers)
        demand = Demand(
            users=USERS, model=shape, rps=settings.rps_per_million_users, adapter=adapter, tokens=max(1, round(tokens)),
            rows_per_user=max(1, round(rows_per_user)),
        )  # fmt: skip
        prices, plan = load_prices(settings.prices), make_plan(demand, load_figures())
        return cls(demand, plan, prices, monthly_cost(plan, demand, prices))

    def to_json(self) -> dict[str, Any]:
        cost = {name: round(value, 2) for name, value in [*vars(self.cost).items(), ("total", self.cost.total)]}
        return {
            "users": USERS, "texts_per_s": self.demand.rps, "tokens": self.demand.tokens, "rows_per_user": self.demand.rows_per_user,
            "currency": self.prices.currency, "month": cost, "storage_bytes": self.plan.storage_bytes, "replicas": self.plan.replicas,
            "core_hours_per_training": round(self.plan.core_hours, 1),
        }  # fmt: skip

    def to_html(self) -> str:
        """A section of the report."""
        plan, cost, runs = self.plan, self.cost, self.demand.runs_per_month
        lines = [
            ["storage", f"{plan.storage_bytes / GiB:,.2f} GiB, all generations kept", f"{cost.storage:,.2f}"],
            ["training", f"{runs:g} runs of {plan.core_hours:,.1f} core hours, on {plan.gpus} GPU", f"{cost.training:,.2f}"],
            ["serving", f"{plan.worker_pods} pods of {plan.replica_cpus} CPUs", f"{cost.serving:,.2f}"],
            ["reads of the store", f"{1 - plan.cached_share:.0%} of the users are not in memory", f"{cost.requests:,.2f}"],
            ["together", "", f"{cost.total:,.2f}"],
        ]
        lead = (
            f"{USERS:,} users with {self.demand.rows_per_user} training rows each, {self.demand.rps:g} texts a second at the busiest time, "
            f"{self.demand.tokens} tokens a text. Reckoned from measured figures as `plora plan` does, with its assumptions."
        )
        head = ["a month", "what", self.prices.currency]
        return f"<h2>What it costs</h2>\n<p>{escape(lead)}</p>\n{table(head, lines)}"


def _numbers(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
