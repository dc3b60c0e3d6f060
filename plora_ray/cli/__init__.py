"""The `plora` command. Each subcommand reads settings, calls one room of the house and prints; no logic lives here."""

from plora_ray.cli.generations import generations_app
from plora_ray.cli.jobs import app, train_all_app
from plora_ray.cli.store import store_app
from plora_ray.cli.users import users_app

app.add_typer(users_app, name="users")
app.add_typer(generations_app, name="generations")
app.add_typer(store_app, name="store")

__all__ = ["app", "train_all_app"]
