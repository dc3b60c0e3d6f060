"""Commands that train, serve, answer and measure."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from plora_ray.cli.console import ConfigOption, SetOption, progress_bar, read_settings, reports_errors
from plora_ray.planning import plan

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.command("train-all")
@reports_errors
def train_all(
    config: ConfigOption,
    only_users_with_new_data: Annotated[
        bool, typer.Option("--only-users-with-new-data", help="Keep what is shared; refit users with new rows, carry over all others.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Partition the rows, say what would be done, train nothing.")] = False,
    overrides: SetOption = None,
) -> None:
    """Train an adapter for every user and publish them as a generation. Resumes an unfinished run by itself."""
    chosen = ["training.only_users_with_new_data=true"] if only_users_with_new_data else []
    settings = read_settings(config, [*(overrides or ()), *chosen])
    from plora_ray.runtime import ray_cluster

    with ray_cluster():
        from plora_ray.training.job import train

        result = train(settings, dry_run=dry_run)
    sys.stdout.flush()
    typer.echo(result.to_json())


def train_all_app() -> None:
    """`python -m plora_ray.train_all`: the same command without its name."""
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command()(train_all)
    single()


@app.command()
@reports_errors
def serve(config: ConfigOption, port: Annotated[int, typer.Option(help="HTTP port.")] = 8000, overrides: SetOption = None) -> None:
    """Serve the current generation over HTTP on a local cluster with the production settings, until interrupted."""
    settings = read_settings(config, overrides)
    import importlib

    # By name: deployments/ builds on this library and must not be imported by it.
    importlib.import_module("deployments.local").serve_until_interrupted(settings, port)


@app.command()
@reports_errors
def predict(
    config: ConfigOption,
    source: Annotated[
        str, typer.Option("--input", help="Rows with user_id and text: parquet, CSV or JSON lines; a path, directory, glob or URL.")
    ],
    output: Annotated[str, typer.Option("--output", help="New directory or s3:// URL for parquet files of answers.")],
    overrides: SetOption = None,
) -> None:
    """Answer every row of a table, each by its own user's adapter, on a Ray cluster. Goes on where it stopped."""
    settings = read_settings(config, overrides)
    from plora_ray.runtime import ray_cluster
    from plora_ray.scoring.job import cpus_needed, score_table

    with ray_cluster(cpus_needed(settings)), progress_bar("scoring") as show:
        scored = score_table(settings, source, output, show)
    typer.echo(scored.model_dump_json())


@app.command()
@reports_errors
def evaluate(
    config: ConfigOption,
    protocol: Annotated[str, typer.Option(help="full, few, zero, time or all.")] = "all",
    baselines: Annotated[
        str, typer.Option(help="Comma-separated: majority, label-prior, population, and those that are trained (docs/evaluate.md).")
    ] = "majority,label-prior,population",
    out: Annotated[Path, typer.Option(help="Directory for report.json, report.html and plots.")] = Path("var/report"),
    overrides: SetOption = None,
) -> None:
    """Measure the current generation on held-out rows, with and without users, beside baselines."""
    settings = read_settings(config, overrides)
    from plora_ray.evaluation.protocols import evaluate_store

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a baseline's job and its rows end with this process
    evaluate_store(settings, protocol, [name.strip() for name in baselines.split(",") if name.strip()], out)
    typer.echo(str(out / "report.json"))


@app.command()
@reports_errors
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders that `plora evaluate --out` wrote.")],
    out: Annotated[Path, typer.Option(help="Directory for comparison.json and comparison.html.")] = Path("var/comparison"),
) -> None:
    """Put several evaluations side by side."""
    from plora_ray.evaluation.runs import compare_runs

    compare_runs(runs, out)
    typer.echo(str(out / "comparison.html"))


app.command("plan")(reports_errors(plan))
