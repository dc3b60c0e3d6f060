"""Commands about the store as a whole."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from plora_ray.cli.console import (
    ConfigOption,
    KeyEnvOption,
    KmsOption,
    SetOption,
    print_json,
    progress_bar,
    read_settings,
    reports_errors,
    store_of,
)

store_app = typer.Typer(no_args_is_help=True, help="Look after the store as a whole.")


@store_app.command("fsck")
@reports_errors
def store_fsck(config: ConfigOption, overrides: SetOption = None) -> None:
    """Check every digest, count and name of the store. Changes nothing; exit code 1 if something is wrong.

    Without store.encryption the records of an encrypted store are checked as they are stored; with it, each is decrypted, too.
    """
    store = store_of(read_settings(config, overrides), locked=True)
    from plora_ray.store.fsck import check

    with progress_bar("checking objects") as show:
        found = check(store, show)
    print_json(asdict(found))
    for problem in found.problems:
        typer.echo(f"{problem.path}: {problem.what}", err=True)
    if found.problems:
        raise typer.Exit(1)


@store_app.command("rotate-key")
@reports_errors
def store_rotate_key(
    config: ConfigOption,
    key_file: Annotated[Path | None, typer.Option(help="File with the new root key.")] = None,
    key_env: KeyEnvOption = None,
    kms_key_id: KmsOption = None,
    rewrap: Annotated[bool, typer.Option("--rewrap", help="Wrap all users' data keys anew, too; or only that.")] = False,
    overrides: SetOption = None,
) -> None:
    """Give an encrypted store another root key. No adapter is rewritten; name the new key in store.encryption afterwards."""
    settings = read_settings(config, overrides)
    from plora_ray.opening import other_root_key, rotate_root_key

    with progress_bar("wrapping data keys") as show:
        newest = rotate_root_key(settings.store, other_root_key(settings.store, key_file, key_env, kms_key_id), rewrap, show)
    typer.echo(f"new data keys are wrapped by version {newest} of the ring")
