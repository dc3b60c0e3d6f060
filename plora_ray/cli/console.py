"""What all commands have in common: their options, one-line errors, settings, stores, progress and output."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from plora_ray.config import Settings, load_settings
from plora_ray.errors import PloraError

ConfigOption = Annotated[Path, typer.Option("--config", help="YAML file of settings.")]
KeyEnvOption = Annotated[str | None, typer.Option(help="The same, in an environment variable.")]
KmsOption = Annotated[str | None, typer.Option(help="The same, as a key of AWS KMS.")]
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


def read_settings(config: Path, overrides: list[str] | None) -> Settings:
    """The settings of the file, with `--set`'s laid over it. Raises ConfigError."""
    return load_settings(config, overrides or ())


def store_of(settings: Settings, *, locked: bool = False) -> Any:
    """The AdapterStore that the settings name; see `open_store`. Raises StoreError if there is none."""
    from plora_ray.opening import open_store

    return open_store(settings.store, locked=locked)


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error; gives what tells it how many of how many are done."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_json(values: object) -> None:
    """On standard output, for people to read as well."""
    typer.echo(json.dumps(values, indent=1, ensure_ascii=False))
