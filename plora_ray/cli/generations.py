"""Commands about generations of adapters."""

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

generations_app = typer.Typer(no_args_is_help=True, help="List, show, activate and clean up generations of adapters.")


@generations_app.command("list")
@reports_errors
def generations_list(config: ConfigOption, overrides: SetOption = None) -> None:
    """All published generations, oldest first."""
    store = store_of(read_settings(config, overrides))
    canary = store.canary()
    for info in store.generations():
        mark = "*" if info.is_current else " "
        tried = f"  canary {canary.share:.1%}" if canary is not None and canary.generation == info.generation else ""
        typer.echo(f"{mark} {info.generation}  {info.created_at}  {info.users:,} users  {info.examples:,} examples  {info.model}{tried}")


@generations_app.command("show")
@reports_errors
def generations_show(generation: str, config: ConfigOption, overrides: SetOption = None) -> None:
    """One generation's manifest, as JSON."""
    from plora_ray.errors import StoreError

    store = store_of(read_settings(config, overrides))
    manifest = store.manifest(generation)
    if manifest is None:
        raise StoreError(f"there is no generation {generation}: `plora generations list` names them")
    typer.echo(manifest.model_dump_json(indent=1))


@generations_app.command("activate")
@reports_errors
def generations_activate(generation: str, config: ConfigOption, overrides: SetOption = None) -> None:
    """Make a published generation the one that serves, forward or back. Running replicas follow within seconds."""
    store = store_of(read_settings(config, overrides))
    store.activate(generation)
    typer.echo(f"{generation} serves")


@generations_app.command("canary")
@reports_errors
def generations_canary(
    generation: str,
    config: ConfigOption,
    share: Annotated[float, typer.Option(help="Of all users, from 0 to 1; 0 ends the canary.")],
    overrides: SetOption = None,
) -> None:
    """Let a published generation answer for a share of the users, beside the current one. Running replicas follow within seconds."""
    store = store_of(read_settings(config, overrides))
    store.set_canary(generation, share)
    typer.echo(f"{generation} serves {share:.1%} of the users" if share else f"{store.current()} serves everybody")


@generations_app.command("compact")
@reports_errors
def generations_compact(config: ConfigOption, overrides: SetOption = None) -> None:
    """Make a generation of the current one, its fresh adapters taken in and erased users' records gone. Nothing is trained."""
    settings = read_settings(config, overrides)
    from plora_ray.training.compaction import compact

    with progress_bar("writing users") as show:
        done = compact(store_of(settings), show)
    if not done.changed:
        typer.echo("nothing to do: no fresh adapter waits and no erased user's record is left", err=True)
    elif not done.active:
        typer.echo(f"another generation took over meanwhile: `plora generations activate {done.generation}` makes this one serve", err=True)
    print_json(asdict(done))


@generations_app.command("copy")
@reports_errors
def generations_copy(
    generation: str,
    config: ConfigOption,
    to: Annotated[str, typer.Option(help="The other store: a path or a URI as store.uri; made if it is missing.")],
    endpoint_url: Annotated[str | None, typer.Option(help="Of the other store, if it is s3:// somewhere else.")] = None,
    key_file: Annotated[Path | None, typer.Option(help="Root key of the other store; else this one's, if any.")] = None,
    key_env: KeyEnvOption = None,
    kms_key_id: KmsOption = None,
    overrides: SetOption = None,
) -> None:
    """Copy a generation, its fresh adapters and all erasures into another store. It doesn't serve there before it is activated."""
    settings = read_settings(config, overrides)
    from plora_ray.opening import other_root_key
    from plora_ray.store.transfer import copy_generation, open_target

    source, other = store_of(settings), settings.store.model_copy(update={"uri": to, "endpoint_url": endpoint_url, "options": {}})
    root_key = other_root_key(settings.store, key_file, key_env, kms_key_id) or settings.store.root_key()
    target = open_target(source, to, other.storage_options(), root_key)
    with progress_bar("copying objects") as show:
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

    settings = read_settings(config, overrides)
    deleted, wrote = ("would delete", "would write") if dry_run else ("deleted", "wrote")
    with progress_bar("writing users") as show:
        garbage = collect_garbage(
            store_of(settings), keep=keep, grace_s=grace_hours * 3600, retention=settings.store.retention, dry_run=dry_run, on_users=show
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
