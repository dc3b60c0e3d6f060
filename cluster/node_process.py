"""One Ray node as one process of this machine: `ray start --block`, its log, its readiness and its end.

Knows the command line and how a node dies with all it started; nothing of clusters, tokens or jobs.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from plora_ray.errors import PloraError

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 30.0
GROUP_TIMEOUT_S = 5.0  # killed processes vanish in milliseconds; where nobody reaps orphans their names stay, and that is no reason to wait
# Shared memory that a node may fill before it spills to disk. Ray would give every node a third of the machine.
OBJECT_STORE_BYTES = 512 * 2**20
SHARED_MEMORY = Path("/dev/shm")
LOG_LINES_SHOWN = 15


class ClusterError(PloraError):
    """A Ray node didn't start, or ended by itself."""


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


class NodeProcess:
    """A head (`join` is None) or a worker that joins the GCS at `join`. Its files lie in `directory`, as on a machine of its own."""

    def __init__(self, directory: Path, environment: Mapping[str, str], cpus: int, head_options: list[str], join: str | None) -> None:
        self.directory = directory
        self._log = directory / "ray-start.log"
        # Ray writes the cluster's address here once all of the node's processes are up.
        self._address_file = directory / "ray_current_cluster"
        directory.mkdir(parents=True)
        role = ["--address", join] if join else ["--head", *head_options]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *role, *self._common_options(cpus)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=dict(environment),
                start_new_session=True,  # Ctrl-C in a terminal must reach the supervisor only; it stops the nodes in order
            )  # fmt: skip

    def _common_options(self, cpus: int) -> list[str]:
        options = [
            "--num-cpus", str(cpus),
            "--num-gpus", "0",  # every node would claim all GPUs of the machine
            "--temp-dir", str(self.directory),
            "--object-store-memory", str(OBJECT_STORE_BYTES),
            "--min-worker-port", "0", "--max-worker-port", "0",  # the fixed range would be shared by all nodes
            "--dashboard-agent-listen-port", "0",
            "--disable-usage-stats",
        ]  # fmt: skip
        if not SHARED_MEMORY.is_dir() or shutil.disk_usage(SHARED_MEMORY).free < 2 * OBJECT_STORE_BYTES:
            options += ["--plasma-directory", str(self.directory)]  # small in many containers; Ray would fall back to /tmp
        return options

    @property
    def pid(self) -> int:
        return self._process.pid

    def alive(self) -> bool:
        return self._process.poll() is None

    def wait_until_ready(self) -> str:
        """Return the cluster's GCS address. Raises ClusterError with the end of the node's log."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if not self.alive():
                raise ClusterError(f"a Ray node ended while starting (exit {self._process.returncode}): {self.last_words()}")
            if self._address_file.exists() and (address := self._address_file.read_text(encoding="utf-8").strip()):
                return address
            time.sleep(0.05)
        raise ClusterError(f"a Ray node wasn't ready after {START_TIMEOUT_S:.0f} s: {self.last_words()}")

    def last_words(self) -> str:
        """The end of the node's log on one line, and where all of it is."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return f"{' | '.join(line.strip() for line in lines[-LOG_LINES_SHOWN:] if line.strip())} (all of it in {self._log})"

    def terminate(self) -> None:
        """Ask the node to end; `wait` collects it. Ray then stops raylet, GCS and dashboard in order."""
        if self.alive():
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the node and all that runs on it at once, like a machine that loses power."""
        # Left to themselves, Ray's workers and what they started would go on for seconds after their raylet.
        running = psutil.Process(self.pid).children(recursive=True) if self.alive() else []
        if self.alive():
            self._process.kill()
        for process in running:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        self._kill_group()

    def wait(self) -> None:
        """Wait for a node that was asked to end; after STOP_TIMEOUT_S it is killed."""
        try:
            self._process.wait(timeout=STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._kill_group()

    def _kill_group(self) -> None:
        # The session was opened for this node, so its group holds nothing else; usually it is empty by now.
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        deadline = time.monotonic() + GROUP_TIMEOUT_S
        while time.monotonic() < deadline:
            try:
                os.killpg(self.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.02)
