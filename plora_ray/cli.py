"""The `plora` command. Each subcommand reads settings, calls one room of the house and prints; no logic lives here."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from plora_ray.config import Settings, load_settings
from plora_ray.errors import PloraError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="A model of its own for every user.")
users_app = typer.Typer(no_args_is_help=True, help="Look at, erase and export single users.")
generations_app = typer.Typer(no_args_is_help=True, help="List, show, activate and clean up generations of adapters.")
store_app = typer.Typer(no_args_is_help=True, help="Look after the store as a whole.")
app.add_typer(users_app, name="users")
app.add_typer(generations_app, name="generations")
app.add_typer(store_app, name="store")

ConfigOption = Annotated[Path, typer.Option("--config", help="YAML file of settings.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="key.path=value, laid over the file; may be repeated.")]


def reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turn the errors that are meant for users into one line on standard error and their exit code."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except PloraError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            typer.echo("interrupted; run the same command again to go on", err=True)
            raise typer.Exit(130) from None

    return wrapped


def _settings(config: Path, overrides: list[str] | None) -> Settings:
    return load_settings(config, overrides or ())


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
    settings = _settings(config, [*(overrides or ()), *chosen])
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
    settings = _settings(config, overrides)
    import importlib

    # By name: deployments/ builds on this library and must not be imported by it.
    importlib.import_module("deployments.local").serve_until_interrupted(settings, port)


@app.command()
@reports_errors
def evaluate(
    config: ConfigOption,
    protocol: Annotated[str, typer.Option(help="full, few, zero or all.")] = "all",
    baselines: Annotated[str, typer.Option(help="Comma-separated: majority, label-prior, population.")] = "majority,label-prior,population",
    out: Annotated[Path, typer.Option(help="Directory for report.json, report.html and plots.")] = Path("var/report"),
    overrides: SetOption = None,
) -> None:
    """Measure the current generation on held-out rows, with and without users, beside baselines."""
    settings = _settings(config, overrides)
    from plora_ray.evaluation.protocols import evaluate_store

    evaluate_store(settings, protocol, [name.strip() for name in baselines.split(",") if name.strip()], out)
    typer.echo(str(out / "report.json"))


def _store(settings: Settings) -> Any:
    from plora_ray.store import AdapterStore

    return AdapterStore.open(settings.store.uri, settings.store.storage_options(), create=False)


@contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error; gives what tells it how many of how many are done."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print(values: object) -> None:
    typer.echo(json.dumps(values, indent=1, ensure_ascii=False))


@users_app.command("list")
@reports_errors
def users_list(config: ConfigOption, limit: int = 20, overrides: SetOption = None) -> None:
    """Keyed hashes of the users in the current generation (the store holds no raw user ids)."""
    store = _store(_settings(config, overrides))
    reader = store.open_generation()
    for index, key in enumerate(reader.keys()):
        if index == limit:
            break
        typer.echo(key.hex())
    typer.echo(f"{reader.users:,} users in generation {reader.generation}", err=True)


@users_app.command("show")
@reports_errors
def users_show(user_id: str, config: ConfigOption, overrides: SetOption = None) -> None:
    """What serves one user, and every trace of the user that the store holds."""
    store = _store(_settings(config, overrides))
    from plora_ray.store.traces import traces_of

    key = store.key(user_id)
    adapter = store.pull(store.open_generation(), key)
    found = None if adapter is None else {
        "source": adapter.source, "generation": adapter.generation, "examples": adapter.examples, "updated_at": adapter.updated_at,
        "bytes": adapter.record.nbytes,
    }  # fmt: skip
    _print({"key": key.hex(), "erased": store.is_erased(key), "adapter": found, "traces": asdict(traces_of(store, key))})


@users_app.command("erase")
@reports_errors
def users_erase(user_id: str, config: ConfigOption, overrides: SetOption = None) -> None:
    """Erase a user: from now on no reader, running job or rollback uses the adapter again."""
    store = _store(_settings(config, overrides))
    store.erase(store.key(user_id))
    typer.echo("erased")


@users_app.command("export")
@reports_errors
def users_export(
    user_id: str, config: ConfigOption, out: Annotated[Path, typer.Option(help="New directory.")], overrides: SetOption = None
) -> None:
    """Write a user's model as a PEFT checkpoint directory."""
    settings = _settings(config, overrides)
    from plora_ray.inference.export import export_user

    export_user(_store(settings), user_id, out)
    typer.echo(str(out))


@users_app.command("import")
@reports_errors
def users_import(
    folder: Annotated[Path, typer.Argument(help="A PEFT checkpoint directory, as `users export` writes it.")],
    config: ConfigOption,
    user: Annotated[str, typer.Option(help="The user's id.")],
    overrides: SetOption = None,
) -> None:
    """Make a PEFT checkpoint of the current generation this user's newest adapter."""
    settings = _settings(config, overrides)
    from plora_ray.inference.bring import import_user

    adapter = import_user(_store(settings), user, folder)
    _print({"key": adapter.key.hex(), "generation": adapter.generation, "examples": adapter.examples, "version": adapter.version})


@users_app.command("refit")
@reports_errors
def users_refit(config: ConfigOption, overrides: SetOption = None) -> None:
    """Fit all users with retained examples on the current generation; for after a new population. Run again, it goes on."""
    settings = _settings(config, overrides)
    from plora_ray.errors import ConfigError
    from plora_ray.inference import FewShotFitter, load_generation
    from plora_ray.inference.refit import refit_fresh
    from plora_ray.store.retained import RetainedExamples

    days = settings.store.retention.examples_days
    if days is None:
        raise ConfigError("no examples are retained: store.retention.examples_days is off")
    loaded = load_generation(_store(settings))
    fitter = FewShotFitter(loaded, batch_tokens=settings.serving.batch_tokens, batch_rows=settings.serving.batch_rows)
    with _bar("fitting users") as show:
        _print(asdict(refit_fresh(loaded, fitter, RetainedExamples(loaded.store.objects, days), show)))


@generations_app.command("list")
@reports_errors
def generations_list(config: ConfigOption, overrides: SetOption = None) -> None:
    """All published generations, oldest first."""
    for info in _store(_settings(config, overrides)).generations():
        mark = "*" if info.is_current else " "
        typer.echo(f"{mark} {info.generation}  {info.created_at}  {info.users:,} users  {info.examples:,} examples  {info.model}")


@generations_app.command("show")
@reports_errors
def generations_show(generation: str, config: ConfigOption, overrides: SetOption = None) -> None:
    """One generation's manifest, as JSON."""
    from plora_ray.errors import StoreError

    store = _store(_settings(config, overrides))
    manifest = store.manifest(generation)
    if manifest is None:
        raise StoreError(f"there is no generation {generation}: `plora generations list` names them")
    typer.echo(manifest.model_dump_json(indent=1))


@generations_app.command("activate")
@reports_errors
def generations_activate(generation: str, config: ConfigOption, overrides: SetOption = None) -> None:
    """Make a published generation the one that serves, forward or back. Running replicas follow within seconds."""
    store = _store(_settings(config, overrides))
    store.activate(generation)
    typer.echo(f"{generation} serves")


@generations_app.command("compact")
@reports_errors
def generations_compact(config: ConfigOption, overrides: SetOption = None) -> None:
    """Make a generation of the current one, its fresh adapters taken in and erased users' records gone. Nothing is trained."""
    settings = _settings(config, overrides)
    from plora_ray.training.compaction import compact

    with _bar("writing users") as show:
        done = compact(_store(settings), show)
    if not done.changed:
        typer.echo("nothing to do: no fresh adapter waits and no erased user's record is left", err=True)
    elif not done.active:
        typer.echo(f"another generation took over meanwhile: `plora generations activate {done.generation}` makes this one serve", err=True)
    _print(asdict(done))


@generations_app.command("copy")
@reports_errors
def generations_copy(
    generation: str,
    config: ConfigOption,
    to: Annotated[str, typer.Option(help="The other store: a path, file:// or s3://bucket/prefix; made if it is missing.")],
    endpoint_url: Annotated[str | None, typer.Option(help="Of the other store, if it is s3:// somewhere else.")] = None,
    overrides: SetOption = None,
) -> None:
    """Copy a generation, its fresh adapters and all erasures into another store. It doesn't serve there before it is activated."""
    settings = _settings(config, overrides)
    from plora_ray.store.transfer import copy_generation, open_target

    source, other = _store(settings), settings.store.model_copy(update={"uri": to, "endpoint_url": endpoint_url})
    target = open_target(source, to, other.storage_options())
    with _bar("copying objects") as show:
        copied = copy_generation(source, generation, target, show)
    typer.echo(f"{copied.generation} with {copied.users:,} users is in {target.uri}")


@generations_app.command("gc")
@reports_errors
def generations_gc(
    config: ConfigOption,
    keep: Annotated[int, typer.Option(help="Newest published generations that stay; the current one always does.")] = 3,
    grace_hours: Annotated[float, typer.Option(help="Nothing begun more recently is touched.")] = 168.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    overrides: SetOption = None,
) -> None:
    """Write generations anew that hold bytes of erased users; delete old ones and what crashed jobs left behind."""
    from plora_ray.training.garbage import collect_garbage

    settings = _settings(config, overrides)
    deleted, wrote = ("would delete", "would write") if dry_run else ("deleted", "wrote")
    with _bar("writing users") as show:
        garbage = collect_garbage(
            _store(settings), keep=keep, grace_s=grace_hours * 3600, retention=settings.store.retention, dry_run=dry_run, on_users=show
        )
    for name in garbage.runs:
        typer.echo(f"{deleted} the working folder of unfinished run {name}")
    for again in garbage.rewritten:
        typer.echo(f"{wrote} {again.generation} anew without {again.held}" + (f": {again.by}" if again.by else ""))
    if garbage.forgotten:
        typer.echo(f"took away {garbage.forgotten:,} fresh adapters that nobody used")
    if garbage.expired:
        typer.echo(f"took away retained examples of {garbage.expired:,} users")
    for item in garbage.deleted:
        kind = "published" if item.published else "unfinished"
        typer.echo(f"{deleted} {item.generation} ({kind}, {item.objects} objects, {item.size:,} bytes)")
    for name, why in garbage.left.items():
        typer.echo(f"left: {name}: {why}", err=True)
    if garbage.failed:
        raise typer.Exit(1)


@store_app.command("fsck")
@reports_errors
def store_fsck(config: ConfigOption, overrides: SetOption = None) -> None:
    """Check every digest, count and name of the store. Changes nothing; exit code 1 if something is wrong."""
    store = _store(_settings(config, overrides))
    from plora_ray.store.fsck import check

    with _bar("checking objects") as show:
        found = check(store, show)
    _print(asdict(found))
    for problem in found.problems:
        typer.echo(f"{problem.path}: {problem.what}", err=True)
    if found.problems:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
