"""A cluster of several nodes on one machine: it starts, loses a node, runs submitted jobs and leaves nothing behind."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from cluster.local import LocalCluster
from cluster.serve_environment import haproxy_environment, haproxy_files
from plora_ray.errors import ConfigError
from plora_ray.runtime import LONGEST_TEMP_DIR

ROOT = Path(__file__).resolve().parents[2]

# Waits until the cluster knows of as many living nodes as it is told, then runs one task on each.
ONE_TASK_A_NODE = """
import sys, time, ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
ray.init(logging_level="ERROR", log_to_driver=False)
@ray.remote(num_cpus=1)
def here():
    return ray.get_runtime_context().get_node_id()
while True:
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    if len(alive) == int(sys.argv[1]):
        break
    time.sleep(0.1)
found = ray.get([here.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote() for node in alive])
print("tasks ran on", len(set(found)), "of", len(ray.nodes()), "nodes")
"""


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A directory with a short path: Ray's sockets lie below it."""
    directory = Path(tempfile.mkdtemp(prefix="p", dir="/tmp"))
    yield directory
    shutil.rmtree(directory)


def _run(command: list[str], cluster: LocalCluster) -> str:
    environment = {**os.environ, **cluster.environment()}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _jobs_status(url: str, token: str) -> int:
    request = urllib.request.Request(f"{url}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def _started_since(before: set[int]) -> list[psutil.Process]:
    """Processes below this one that are new. Those of the cluster that lost their parent are found by its directory instead."""
    return [process for process in psutil.Process().children(recursive=True) if process.pid not in before]


def _mentioning(directory: Path) -> list[int]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if str(directory) in " ".join(process.info["cmdline"] or []):
            found.append(process.pid)
    return found


@pytest.mark.timeout(120)
def test_three_nodes_run_a_job_lose_a_node_gain_another_and_leave_no_process(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    home = Path.home() / ".ray"
    home_existed = home.exists()
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    working_dir = scratch / "job"
    working_dir.mkdir()
    (working_dir / "job.py").write_text(ONE_TASK_A_NODE)

    with LocalCluster(nodes=3, cpus_per_node=2, temp_dir=scratch) as cluster:
        assert cluster.alive == [0, 1, 2]
        assert cluster.directory.parent == scratch
        assert "RAY_AUTH_TOKEN" not in os.environ, "the token is the cluster's, not this process's"
        url = cluster.dashboard_url
        assert url is not None
        assert _jobs_status(url, cluster.environment()["RAY_AUTH_TOKEN"]) == 200
        assert _jobs_status(url, "0" * 64) == 403

        submit = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--address", url, "--working-dir", str(working_dir)]
        assert "tasks ran on 3 of 3 nodes" in _run([*submit, "--", "python", "job.py", "3"], cluster)

        processes = _started_since(before)
        cluster.remove_node(2)
        assert cluster.alive == [0, 1]
        assert cluster.add_node() == 3
        assert "tasks ran on 3 of 4 nodes" in _run([sys.executable, "-c", ONE_TASK_A_NODE, "3"], cluster)
        processes += _started_since(before)

    _, running = psutil.wait_procs(set(processes), timeout=5)
    assert not [process for process in running if process.status() != psutil.STATUS_ZOMBIE]
    assert not _mentioning(scratch)
    assert home.exists() == home_existed, "nothing may be written to the home directory"


@pytest.mark.timeout(60)
def test_the_command_says_how_to_submit_and_stops_at_sigterm(scratch: Path) -> None:
    command = [sys.executable, "-m", "cluster.local", "--nodes", "1", "--dashboard-port", "18271", "--temp-dir", str(scratch)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        said = ""
        while "Ctrl-C" not in said and (line := running.stdout.readline()):
            said += line
        assert re.search(r"export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=[0-9a-f]{64}\n", said)
        assert "ray job submit --address http://127.0.0.1:18271 --working-dir ." in said
        assert _mentioning(scratch)
        running.send_signal(signal.SIGTERM)
        assert running.wait(timeout=40) == 0
    assert not _mentioning(scratch)


def test_a_head_that_redis_does_not_know_and_unknown_nodes_cannot_be_removed() -> None:
    cluster = LocalCluster(nodes=2)
    with pytest.raises(ConfigError, match="head"):
        cluster.remove_node(0)
    with pytest.raises(ConfigError, match="redis_address"):
        cluster.lose_head()
    with pytest.raises(ConfigError, match="no node 7"):
        cluster.remove_node(7)


def test_an_empty_cluster_is_refused() -> None:
    with pytest.raises(ConfigError, match="nodes=0"):
        LocalCluster(nodes=0)


def test_users_are_hashed_onto_replicas_by_the_header_that_clients_send() -> None:
    first, *directives = haproxy_environment()["RAY_SERVE_HAPROXY_BALANCE_ALGORITHM"].split("\n    ")
    assert first == "hdr(x-user-id)"
    assert directives == ["hash-type consistent", "hash-balance-factor 150"]


def test_haproxy_accepts_the_socket_paths_of_every_directory_that_ray_accepts() -> None:
    longest = "/" + "d" * (LONGEST_TEMP_DIR - len("/00") - 1)  # a node's own folder lies below the cluster's
    files = haproxy_files(Path(longest))
    for name in ("RAY_SERVE_HAPROXY_SOCKET_PATH", "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH"):
        directory, _, socket = files[name].rpartition("/")
        assert len(f"{directory}/{'n' * 56}/{socket}") <= 97, name
