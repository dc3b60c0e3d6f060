"""Commands about single users."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from plora_ray.cli.console import (
    ConfigOption,
    SetOption,
    print_json,
    progress_bar,
    read_settings,
    reports_errors,
    store_of,
)

users_app = typer.Typer(no_args_is_help=True, help="Look at, erase and export single users.")


@users_app.command("list")
@reports_errors
def users_list(config: ConfigOption, limit: int = 20, overrides: SetOption = None) -> None:
    """Keyed hashes of the users in the current generation (the store holds no raw user ids)."""
    store = store_of(read_settings(config, overrides))
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
    store = store_of(read_settings(config, overrides))
    from plora_ray.store.traces import traces_of

    key = store.key(user_id)
    adapter = store.pull(store.open_generation(), key)
    found = None if adapter is None else {
        "source": adapter.source, "generation": adapter.generation, "examples": adapter.examples, "updated_at": adapter.updated_at,
        "bytes": adapter.record.nbytes,
    }  # fmt: skip
    print_json({"key": key.hex(), "erased": store.is_erased(key), "adapter": found, "traces": asdict(traces_of(store, key))})


@users_app.command("erase")
@reports_errors
def users_erase(user_id: str, config: ConfigOption, overrides: SetOption = None) -> None:
    """Erase a user: from now on no reader, running job or rollback uses the adapter again."""
    store = store_of(read_settings(config, overrides))
    store.erase(store.key(user_id))
    typer.echo("erased")


@users_app.command("export")
@reports_errors
def users_export(
    user_id: str, config: ConfigOption, out: Annotated[Path, typer.Option(help="New directory.")], overrides: SetOption = None
) -> None:
    """Write a user's model as a PEFT checkpoint directory."""
    settings = read_settings(config, overrides)
    from plora_ray.inference.export import export_user

    export_user(store_of(settings), user_id, out)
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
    settings = read_settings(config, overrides)
    from plora_ray.inference.bring import import_user

    adapter = import_user(store_of(settings), user, folder)
    print_json({"key": adapter.key.hex(), "generation": adapter.generation, "examples": adapter.examples, "version": adapter.version})


@users_app.command("refit")
@reports_errors
def users_refit(config: ConfigOption, overrides: SetOption = None) -> None:
    """Fit all users with retained examples on the current generation; for after a new population. Run again, it goes on."""
    settings = read_settings(config, overrides)
    from plora_ray.errors import ConfigError
    from plora_ray.inference import FewShotFitter, load_generation
    from plora_ray.inference.refit import refit_fresh

    days = settings.store.retention.examples_days
    if days is None:
        raise ConfigError("no examples are retained: store.retention.examples_days is off")
    loaded = load_generation(store_of(settings))
    fitter = FewShotFitter(loaded, batch_tokens=settings.serving.batch_tokens, batch_rows=settings.serving.batch_rows)
    with progress_bar("fitting users") as show:
        print_json(asdict(refit_fresh(loaded, fitter, loaded.store.retained_examples(days), show)))
