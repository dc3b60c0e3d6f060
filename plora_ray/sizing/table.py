"""A plan as a table for people: what, how much, and where the number comes from."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from plora_ray.sizing.demand import Demand
from plora_ray.sizing.figures import Figure, Figures
from plora_ray.sizing.plan import ENGINES_AT_A_SWAP, GENERATIONS_KEPT, GiB, Plan
from plora_ray.sizing.prices import MonthlyCost, Prices

MiB = 2**20


def plan_table(plan: Plan, demand: Demand, figures: Figures) -> Table:
    """One line a quantity."""
    table = Table(
        "what", "how much", "reckoned from", title=f"{demand.users:,} users, {demand.rps:,.0f} texts a second of {demand.tokens} tokens"
    )
    for line in _lines(plan, demand, figures):
        table.add_row(*line)
    return table


def cost_table(cost: MonthlyCost, prices: Prices) -> Table:
    """A month at the reader's prices."""
    table = Table("a month", prices.currency)
    for name in ("serving", "training", "storage", "requests", "total"):
        table.add_row(name, f"{getattr(cost, name):,.0f}")
    return table


def sources(figures: Figures) -> Iterator[str]:
    """Each figure with its value and where it comes from."""
    for name in type(figures).model_fields:
        figure = getattr(figures, name)
        if isinstance(figure, Figure):
            yield f"{name} = {figure.value:g}: {_mark(figure)}{figure.source}"


def _lines(plan: Plan, demand: Demand, figures: Figures) -> Iterator[tuple[str, str, str]]:
    yield "a user's record", _size(plan.record_bytes), f"{demand.width:,} numbers"
    yield "a generation in the store", _size(plan.generation_bytes), "record, key, digests"
    yield f"the store, {GENERATIONS_KEPT} generations", _size(plan.storage_bytes), "with shared weights"
    yield "objects of a generation, at most", f"{plan.objects:,}", "partitions and waves as the job cuts them"
    yield "writing a generation", f"{plan.publish_s:,.0f} s", _mark(figures.published_users_per_s) + "by users and by bytes"
    yield "reading its index in a replica", f"{plan.open_s:,.1f} s", _mark(figures.open_s_per_million_users) + "by users"
    yield "cores busy at the peak", f"{plan.peak_cores:,.1f}", _mark(figures.core_s_per_answer) + "tokens x block parameters"
    yield (
        "replicas",
        f"{plan.replicas} of {plan.replica_cpus} CPUs",
        _mark(figures.busy_share) + f"{figures.busy_share.value:.0%} busy, at least two",
    )
    yield "memory of a replica", _size(plan.replica_memory_bytes), f"process, and {ENGINES_AT_A_SWAP} x model, index and cache at a swap"
    yield "users whose adapter is in memory", f"{plan.cached_share:.0%}", f"serving.cache_bytes {_size(plan.cache_bytes)}"
    yield "worker pods to serve", f"{plan.worker_pods} of {_size(plan.pod_memory_bytes)}", "one for the Personalizer"
    yield (
        "training on CPUs",
        f"{plan.core_hours:,.1f} core hours",
        _mark(figures.core_s_per_fitted_row) + f"{demand.rows:,} rows, {demand.epochs} epochs",
    )
    yield (
        "GPUs to train",
        f"{plan.gpus} for {plan.run_hours:,.1f} h",
        _mark(figures.cores_per_gpu) + f"{figures.cores_per_gpu.value:g} cores each",
    )


def _mark(figure: Figure) -> str:
    return "" if figure.measured else "ASSUMED: "


def _size(bytes_: float) -> str:
    return f"{bytes_ / GiB:,.1f} GiB" if bytes_ >= GiB else f"{bytes_ / MiB:,.1f} MiB" if bytes_ >= MiB else f"{bytes_:,.0f} B"
