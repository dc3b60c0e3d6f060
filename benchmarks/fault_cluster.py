"""The cluster that the faults happen to: a head without work, two workers with HAProxy and replicas of made-up users.

Knows how to start it and how to give it other settings; nothing of faults or figures.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.made_generation import MODEL, publish
from cluster.local import LocalCluster
from cluster.node_process import ClusterError, free_port
from cluster.serve_application import ServeApplication
from cluster.serve_environment import haproxy_environment, shared_port_environment
from plora_ray.store import AdapterStore

USERS = 1000
CPUS_PER_NODE = 6  # logical ones: all replicas, one that replaces another and the Personalizer fit on the node that is left


@dataclass(frozen=True)
class FaultCluster:
    """Three running nodes and the application on them, at `url` of the workers."""

    nodes: LocalCluster
    application: ServeApplication
    url: str
    store: str

    def deploy(self, serving: Mapping[str, Any]) -> None:
        """Deploy with these serving settings."""
        settings = {"model": {"name": MODEL}, "store": {"uri": self.store}, "serving": {"replica_cpus": 1, **serving}}
        self.application.deploy(settings)


@contextmanager
def fault_cluster(*, redis: bool = False) -> Iterator[FaultCluster]:
    """A new cluster, with nothing deployed yet; nothing of it is left at the end. redis: the head may be restarted."""
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")  # proxies may start slowly on a busy machine
    folder, port = Path(tempfile.mkdtemp(prefix="f", dir="/tmp")), free_port()  # a short path: sockets lie below it
    environment = {**haproxy_environment(), **shared_port_environment(port)}
    try:
        publish(AdapterStore(str(folder / "store")), USERS)
        with (
            _redis(folder, redis) as address,
            LocalCluster(3, CPUS_PER_NODE, temp_dir=folder, env=environment, head_cpus=0, redis_address=address) as nodes,
        ):
            application = ServeApplication(nodes, folder, free_port())
            yield FaultCluster(nodes, application, f"http://127.0.0.1:{port}", str(folder / "store"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _redis(folder: Path, wanted: bool) -> Iterator[str | None]:
    """The address of a Redis server of this run, or None if none is wanted. Raises ClusterError if it isn't installed."""
    if not wanted:
        yield None
        return
    binary = shutil.which("redis-server")
    if binary is None:
        raise ClusterError("restarting the head needs redis-server on the PATH: install Redis, or leave head_restart out with --only")
    port = free_port()
    with (folder / "redis.log").open("w") as log:
        process = subprocess.Popen([binary, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)], stdout=log)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()
