"""The `plora plan` command: from options to a table, and an overlay if one is asked for. All reckoning is plora_ray/sizing's."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def plan(
    users: Annotated[float, typer.Option(help="How many, as 1e7.")],
    rps: Annotated[float, typer.Option(help="Texts to answer a second at the busiest time.")],
    model: Annotated[str, typer.Option(help="embedded, bert-base, roberta-large, ...; a wrong name lists them all.")] = "embedded",
    parameters: Annotated[float | None, typer.Option(help="Of a model that isn't known by name, as 7e9.")] = None,
    kind: Annotated[str, typer.Option(help="plora (a vector a user) or lora (private matrices).")] = "plora",
    tokens: Annotated[int, typer.Option(help="Of a text, on average.")] = 64,
    rows_per_user: Annotated[int, typer.Option(help="Training rows of a user, on average.")] = 16,
    train_hours: Annotated[float, typer.Option(help="How long a training run may take.")] = 8.0,
    cores_per_gpu: Annotated[
        float | None, typer.Option(help="CPU cores whose work one of your GPUs does, if you have measured it.")
    ] = None,
    prices: Annotated[Path | None, typer.Option(help="YAML file of prices; docs/cost.md shows one.")] = None,
    out: Annotated[Path | None, typer.Option(help="New overlay to write: k8s/overlays/NAME.")] = None,
) -> None:
    """Reckon memory, replicas, GPUs, objects and cost from measured figures; write a Kustomize overlay with the numbers."""
    from rich.console import Console

    from plora_ray.sizing import load_figures, load_prices, make_plan, monthly_cost
    from plora_ray.sizing.demand import parse_demand
    from plora_ray.sizing.overlay import write_overlay
    from plora_ray.sizing.table import cost_table, plan_table, sources

    demand = parse_demand(
        model, parameters, users=users, rps=rps, adapter={"kind": kind}, tokens=tokens, rows_per_user=rows_per_user, train_hours=train_hours
    )
    figures = load_figures(cores_per_gpu)
    priced = load_prices(prices) if prices else None
    planned = make_plan(demand, figures)
    if out is not None:
        write_overlay(out, planned, demand)
    console = Console()
    console.print(plan_table(planned, demand, figures))
    if priced is not None:
        console.print(cost_table(monthly_cost(planned, demand, priced), priced))
    for line in sources(figures):
        console.print(line, style="dim", highlight=False)
    if out is not None:
        console.print(f"{out} is written: look at it, then kubectl apply -k {out}", highlight=False)
