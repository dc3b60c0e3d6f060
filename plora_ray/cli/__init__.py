"""The `plora` command. Each subcommand reads settings, calls one room of the house and prints; no logic lives here."""

from typing import Annotated

import typer

from plora_ray import __version__
from plora_ray.cli.generations import generations_app
from plora_ray.cli.jobs import app, train_all_app
from plora_ray.cli.store import store_app
from plora_ray.cli.users import users_app


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"plora-ray {__version__}")
        raise typer.Exit


@app.callback()
def plora(
    version: Annotated[bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Say the version and stop.")] = False,
) -> None:
    """A model of its own for every user."""


app.add_typer(users_app, name="users")
app.add_typer(generations_app, name="generations")
app.add_typer(store_app, name="store")

__all__ = ["app", "train_all_app"]
