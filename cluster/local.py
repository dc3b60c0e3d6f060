"""A Ray cluster of several nodes on one machine: `python -m cluster.local --nodes 3`, or LocalCluster in a test.

Each node is a `ray start` of its own with its own directory, so nodes share nothing but the network, one can be lost alone, and
`ray job submit` finds a real dashboard. Only holders of the cluster's token may join. CPU only: the nodes are told to see no GPU.
Knows how to start, lose and stop nodes; nothing of training or serving.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Annotated, Self

import typer

from cluster.node_process import ClusterError, NodeProcess, free_port
from cluster.serve_environment import haproxy_environment, haproxy_files
from plora_ray.errors import ConfigError, PloraError
from plora_ray.runtime import LONGEST_TEMP_DIR, private_cluster_environment

WATCH_INTERVAL_S = 1.0
JOIN_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


class LocalCluster:
    """`nodes` Ray nodes, the first of them the head with dashboard and job server. A context manager: all nodes end with it.

    env lies over this process's environment for every Ray process. temp_dir holds a new directory for the run, kept afterwards
    for its logs. ray_port and dashboard_port 0 take free ports. Without RAY_AUTH_MODE in the environment the cluster gets token
    authentication with a fresh token that exists in the processes' environment only. head_cpus: what the head offers, where that isn't
    cpus_per_node; 0 keeps work off it, as in production. redis_address: host:port that holds what the head knows, so that it can be
    restarted. The nodes share one IP address: Serve applications need `proxy_location: HeadOnly` here, or the variables of
    cluster.serve_environment.shared_port_environment.
    """

    def __init__(
        self,
        nodes: int = 3,
        cpus_per_node: int = 2,
        *,
        dashboard: bool = True,
        dashboard_port: int = 0,
        ray_port: int = 0,
        temp_dir: Path = Path("var/ray"),
        env: Mapping[str, str] | None = None,
        head_cpus: int | None = None,
        redis_address: str | None = None,
    ) -> None:
        if nodes < 1 or cpus_per_node < 1:
            raise ConfigError(f"a cluster needs at least one node and one CPU a node (got nodes={nodes}, cpus_per_node={cpus_per_node})")
        self._count = nodes
        self._cpus = cpus_per_node
        self._head_cpus = cpus_per_node if head_cpus is None else head_cpus
        self._redis_address = redis_address
        self._dashboard_port = (dashboard_port or free_port()) if dashboard else None
        self._ray_port = ray_port
        self._temp_dir = temp_dir
        self._overlay = {**private_cluster_environment(), **(env or {})}
        self._nodes: list[NodeProcess | None] = []  # an index stays a node's name when others are lost
        self._restarts = 0
        self._address: str | None = None
        self._directory: Path | None = None

    @property
    def address(self) -> str:
        """The GCS's host:port, as RAY_ADDRESS takes it."""
        if self._address is None:
            raise ClusterError("the cluster isn't running: use it in a `with` statement")
        return self._address

    @property
    def dashboard_url(self) -> str | None:
        """Where `ray job submit --address` goes; None without a dashboard."""
        return None if self._dashboard_port is None else f"http://127.0.0.1:{self._dashboard_port}"

    @property
    def directory(self) -> Path:
        """Logs and sockets of this run, a folder per node."""
        if self._directory is None:
            raise ClusterError("the cluster isn't running: use it in a `with` statement")
        return self._directory

    @property
    def alive(self) -> list[int]:
        """Indices of the nodes whose processes run."""
        return [index for index, node in enumerate(self._nodes) if node is not None and node.alive()]

    def pid(self, index: int) -> int:
        """The process of a node; all that runs on the node descends from it."""
        node = self._nodes[index]
        if node is None:
            raise ConfigError(f"node {index} was removed; running: {', '.join(map(str, self.alive))}")
        return node.pid

    def environment(self) -> dict[str, str]:
        """What a child process needs, over its own environment, to join: addresses, authentication and the cluster's `env`."""
        shared = {**os.environ, **self._overlay}
        joining = {name: shared[name] for name in JOIN_VARIABLES if name in shared}
        jobs = {"RAY_API_SERVER_ADDRESS": self.dashboard_url} if self.dashboard_url else {}
        return {**self._overlay, **joining, **jobs, "RAY_ADDRESS": self.address}

    def __enter__(self) -> Self:
        self._directory = _run_directory(self._temp_dir)
        try:
            head = self._start_head(self._ray_port, self.directory / "0")
            self._nodes.append(head)
            self._address = head.wait_until_ready()
            # Together: starting a node is mostly importing Python modules.
            for worker in [self._start_worker() for _ in range(self._count - 1)]:
                worker.wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def add_node(self) -> int:
        """Start one more worker, wait until it has joined and return its index."""
        address = self.address
        node = self._start_worker()
        if node.wait_until_ready() != address:
            raise ClusterError(f"the new node joined another cluster than {address}")
        return len(self._nodes) - 1

    def remove_node(self, index: int) -> None:
        """Lose a worker without warning; the cluster finds out by itself. The head (0) is `lose_head`'s."""
        if index == 0:
            raise ConfigError("node 0 is the head; losing it would end the cluster (lose_head, if Redis holds what it knows)")
        node = self._nodes[index] if 0 < index < len(self._nodes) else None
        if node is None:
            raise ConfigError(f"there is no node {index}; running: {', '.join(map(str, self.alive))}")
        node.kill()
        self._nodes[index] = None

    def lose_head(self) -> None:
        """Lose the head without warning, for `restart_head`. Raises ConfigError without redis_address: nothing would outlive it."""
        if self._redis_address is None:
            raise ConfigError("without redis_address the cluster ends with its head")
        head, self._nodes[0] = self._nodes[0], None
        if head is not None:
            head.kill()

    def restart_head(self) -> None:
        """Start the lost head at its old address and wait until it answers; the workers come back to it by themselves."""
        address = self.address
        self._restarts += 1
        head = self._start_head(int(address.rpartition(":")[2]), self.directory / f"r{self._restarts}")
        self._nodes[0] = head
        if head.wait_until_ready() != address:
            raise ClusterError(f"the head came back at another address than {address}")

    def stop(self) -> None:
        """End every node by its own handle, workers before the head, and wait for them. May be called again."""
        nodes = [node for node in reversed(self._nodes) if node is not None]
        for node in nodes:
            node.terminate()
        for node in nodes:
            node.wait()
        self._nodes.clear()
        self._address = None

    def watch(self) -> None:
        """Block while all nodes run. Raises ClusterError when one ends by itself."""
        while True:
            for index, node in enumerate(self._nodes):
                if node is not None and not node.alive():
                    raise ClusterError(f"node {index} ended by itself: {node.last_words()}")
            time.sleep(WATCH_INTERVAL_S)

    def _start_head(self, port: int, directory: Path) -> NodeProcess:
        options = [
            "--port", str(port),
            "--include-dashboard", str(self._dashboard_port is not None).lower(),
            "--ray-client-server-port", str(free_port()),  # Ray's own default port would clash with a second cluster
        ]  # fmt: skip
        if self._dashboard_port is not None:
            options += ["--dashboard-port", str(self._dashboard_port)]
        environment = self._node_environment()
        if self._redis_address is not None:
            environment["RAY_REDIS_ADDRESS"] = self._redis_address
        return NodeProcess(directory, environment, self._head_cpus, options, None)

    def _start_worker(self) -> NodeProcess:
        node = NodeProcess(self.directory / str(len(self._nodes)), self._node_environment(), self._cpus, [], self.address)
        self._nodes.append(node)
        return node

    def _node_environment(self) -> dict[str, str]:
        inherited = {key: value for key, value in os.environ.items() if key not in {"RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"}}
        return inherited | {
            # A job's `python` has to be the one that has Ray and this library.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # all nodes end together: there is nowhere to move work to
            **haproxy_files(self.directory),
            **self._overlay,
        }


def _run_directory(base: Path) -> Path:
    """A new directory under `base`, or under the system's temporary directory where node sockets' paths would get too long."""
    base = base.resolve()
    base.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="", dir=base))
    if len(str(directory / "00")) <= LONGEST_TEMP_DIR:
        return directory
    directory.rmdir()
    return Path(tempfile.mkdtemp(prefix="ray-"))


def _instructions(cluster: LocalCluster) -> str:
    joining = cluster.environment()
    exports = " ".join(f"{name}={joining[name]}" for name in JOIN_VARIABLES if name in joining)
    return (
        f"Ray runs: {len(cluster.alive)} nodes, address {cluster.address}, logs in {cluster.directory}\n\n"
        "Submit a job from another terminal. The token is this cluster's only key and ends with it. The job runs in a copy of the\n"
        "working directory, so the settings must name data and store by absolute paths or URLs:\n\n"
        f"    export {exports}\n"
        f"    ray job submit --address {cluster.dashboard_url} --working-dir . -- python -m plora_ray.train_all --config FILE\n\n"
        "Ctrl-C stops every node."
    )


def main(
    nodes: Annotated[int, typer.Option(min=1, help="Ray nodes, head included.")] = 3,
    cpus_per_node: Annotated[int, typer.Option(min=1, help="CPUs that each node offers, whatever the machine has.")] = 2,
    dashboard_port: Annotated[int, typer.Option(help="Dashboard and job server.")] = 8265,
    ray_port: Annotated[int, typer.Option(help="GCS; 0 takes a free port.")] = 0,
    temp_dir: Annotated[Path, typer.Option(help="Logs and sockets of this run go into a new directory below it.")] = Path("var/ray"),
) -> None:
    """Run a Ray cluster on this machine until interrupted (SIGINT or SIGTERM)."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        # With the serving variables, so that an application deployed here behaves as in production.
        with LocalCluster(
            nodes, cpus_per_node, dashboard_port=dashboard_port, ray_port=ray_port, temp_dir=temp_dir, env=haproxy_environment()
        ) as cluster:
            typer.echo(_instructions(cluster))
            cluster.watch()
    except KeyboardInterrupt:
        typer.echo("all nodes stopped", err=True)
    except PloraError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from None


if __name__ == "__main__":
    typer.run(main)
