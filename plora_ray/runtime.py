"""Joining a Ray cluster, or starting a private one on this machine that ends with the command.

Ray reads its authentication mode when it is imported, so this file imports it last and its callers after it.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LONGEST_TEMP_DIR = 40  # Ray puts Unix sockets below it, whose paths may have 107 bytes


def private_cluster_environment() -> dict[str, str]:
    """Environment of a cluster that only this command and its children may join: a fresh token, kept in memory."""
    if "RAY_AUTH_MODE" in os.environ:
        return {}
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}


def ray_temp_dir() -> str | None:
    """var/ray below the working directory, or None (Ray's default) where its socket paths would get too long."""
    path = Path("var/ray").resolve()
    if len(str(path)) > LONGEST_TEMP_DIR:
        return None
    path.mkdir(parents=True, exist_ok=True)
    return str(path)


@contextmanager
def ray_cluster(cpus: int | None = None) -> Iterator[None]:
    """Connected to RAY_ADDRESS if it is set (as in a submitted job), else to a private local cluster; disconnected at the end.

    cpus: of the private cluster; all of this machine's if None.
    """
    joining = bool(os.environ.get("RAY_ADDRESS"))
    if not joining:
        os.environ.update(private_cluster_environment())
    import ray

    if joining:
        ray.init(log_to_driver=False, logging_level="WARNING")
    else:
        ray.init(
            address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level="WARNING", _temp_dir=ray_temp_dir()
        )
    try:
        yield
    finally:
        ray.shutdown()
