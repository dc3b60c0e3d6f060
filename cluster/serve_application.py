"""An application on a LocalCluster, deployed and looked at as an operator does it: `serve deploy` and the dashboard's REST interface.

Knows Serve's config files and states of replicas; nothing of what the application answers.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]
import yaml

from cluster.local import LocalCluster
from cluster.node_process import ClusterError

ROOT = Path(__file__).parents[1]
PRODUCTION = ROOT / "deployments" / "serve.yaml"
POLL_S = 0.1
ANSWER_WITHIN_S = 5.0
WAITS_S = 300.0
CONNECTIONS = 20  # the kernel gives each to one of the HAProxies at random


@dataclass(frozen=True)
class Replica:
    """A replica as the controller knows it. state: Serve's word; RUNNING takes requests."""

    name: str
    state: str
    node: str
    pid: int


class ServeApplication:
    """The application of deployments/serve.yaml on the cluster's nodes, with HAProxy on each.

    head_port: where the head's HAProxy listens; the workers' is in their environment
    (cluster.serve_environment.shared_port_environment). folder: keeps the config file that was deployed last.
    """

    def __init__(self, cluster: LocalCluster, folder: Path, head_port: int) -> None:
        self._cluster, self._folder, self._head_port = cluster, folder, head_port
        environment = cluster.environment()
        token = environment.get("RAY_AUTH_TOKEN")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._environment = {**os.environ, **environment}

    def deploy(self, settings: Mapping[str, Any]) -> None:
        """`serve deploy` with these settings, the first time or as an update; returns when Serve has taken it in. Raises ClusterError."""
        config = self._folder / "serve.yaml"
        wanted = yaml.safe_load(PRODUCTION.read_text())
        wanted["http_options"]["port"] = self._head_port
        wanted["applications"][0]["args"] = {"settings": dict(settings)}
        config.write_text(yaml.safe_dump(wanted))
        command = [str(Path(sys.executable).with_name("serve")), "deploy", str(config), "--address", str(self._cluster.dashboard_url)]
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ClusterError(f"serve deploy failed: {done.stderr.strip()[-1000:]}")

    def replicas(self, deployment: str = "Predictor") -> list[Replica]:
        """All replicas that the controller knows, in whatever state; none while the head can't be asked."""
        try:
            answer = httpx.get(f"{self._cluster.dashboard_url}/api/serve/applications/", headers=self._headers, timeout=ANSWER_WITHIN_S)
            found = answer.json()["applications"]["plora"]["deployments"][deployment]["replicas"]
        except (httpx.TransportError, ValueError, KeyError):
            return []
        return [Replica(one["replica_id"], one["state"], one.get("node_id") or "", one.get("pid") or 0) for one in found]

    def wait_until_answering(self, url: str, within_s: float = WAITS_S) -> None:
        """Wait until the application is ready at `url` on each of many new connections, so behind every HAProxy. Raises ClusterError."""
        deadline = time.monotonic() + within_s
        while not all(_is_ready(url) for _ in range(CONNECTIONS)):
            if time.monotonic() > deadline:
                raise ClusterError(f"{url} isn't ready after {within_s:.0f} s (logs in {self._cluster.directory})")
            time.sleep(POLL_S)

    def on_node(self, index: int) -> set[str]:
        """Names of the replicas that run on a node of the cluster."""
        node = psutil.Process(self._cluster.pid(index))
        there = {process.pid for process in node.children(recursive=True)}
        return {one.name for one in self.replicas() if one.pid in there}

    def wait_for(self, count: int, *, without: Collection[str] = (), within_s: float = WAITS_S) -> None:
        """Wait until as many replicas run, not counting those named in `without`. Raises ClusterError."""
        self._wait(lambda: sum(one.state == "RUNNING" and one.name not in without for one in self.replicas()) == count, within_s)

    def wait_until_gone(self, names: Collection[str], within_s: float = WAITS_S) -> None:
        """Wait until the controller knows none of these any more. Raises ClusterError."""
        self._wait(lambda: bool(known := self.replicas()) and not any(one.name in names for one in known), within_s)

    def _wait(self, condition: Callable[[], bool], within_s: float) -> None:
        deadline = time.monotonic() + within_s
        while not condition():
            if time.monotonic() > deadline:
                states = ", ".join(f"{one.name} {one.state}" for one in self.replicas())
                raise ClusterError(f"after {within_s:.0f} s the replicas are: {states or 'none'} (logs in {self._cluster.directory})")
            time.sleep(POLL_S)


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=ANSWER_WITHIN_S).status_code == 200
    except httpx.TransportError:
        return False
