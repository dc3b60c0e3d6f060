"""What ranks tell reaches the driver's board, Ray Train and Prometheus, on a real Ray cluster."""

from __future__ import annotations

import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from plora_ray.training.population import StepsDone
from plora_ray.training.rank import ModelHeld
from plora_ray.training.user_stage import WaveDone

NAMES = ("rows_total", "users_total", "waves_total", "loss", "step_seconds", "parameter_bytes")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def metrics_url() -> Iterator[str]:
    """A cluster of one node; where its agent answers Prometheus."""
    import ray

    port = free_port()
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, _metrics_export_port=port,
        _system_config={"metrics_report_interval_ms": 500},
    )  # fmt: skip
    yield f"http://127.0.0.1:{port}/metrics"
    ray.shutdown()


def rank(board: Any, group: str, number: int, generation: str = "g-other") -> tuple[Any, list[dict[str, Any]]]:
    """An observer as a rank has it, and the list that what it reports to Ray Train goes to."""
    from plora_ray.training.board import RankObserver

    reported: list[dict[str, Any]] = []
    return RankObserver(board, group, number, generation, reported.append), reported


def test_the_board_adds_up_the_ranks_and_counts_every_start_of_the_workers_once(metrics_url: str) -> None:
    import ray

    from plora_ray.training.board import ProgressBoard

    board = ProgressBoard.remote(10, 100)  # type: ignore[attr-defined]
    for group in ("first", "second"):
        for number in (1, 0):  # in whichever order they come
            rank(board, group, number)[0].on_model(ModelHeld("zero3", 2, 1000, 500 + number))
    zero, one = rank(board, "second", 0)[0], rank(board, "second", 1)[0]
    one.on_steps(StepsDone(10, 20, 10, 3.0, 0.1, 80, 2.0))
    zero.on_steps(StepsDone(10, 20, 10, 1.0, 0.1, 80, 2.0))
    for _ in range(2):
        zero.on_wave(WaveDone(4, 7, 50))  # told again by workers that were started again
    found = ray.get(board.snapshot.remote())
    assert found.starts == 2 and found.parameter_bytes_held == {0: 500, 1: 501} and "2 ranks, zero3" in found.model
    assert (found.step, found.loss, found.users_done, found.rows) == (10, 2.0, 17, 210)
    assert [point.step for point in found.points] == [10]
    assert not ray.get(board.snapshot.remote(1)).points, "a point that the driver has seen is not sent again"


def test_prometheus_finds_the_metrics_of_every_rank_and_no_other_labels(metrics_url: str) -> None:
    import ray

    from plora_ray.training.board import ProgressBoard

    @ray.remote(num_cpus=0)
    class Rank:
        def work(self, board: Any, number: int) -> list[dict[str, Any]]:
            observer, reported = rank(board, "group", number, "g-test")
            observer.on_model(ModelHeld("replicated", 2, 1000, 1000))
            observer.on_steps(StepsDone(10, 20, 10, 0.5, 0.1, 80, 2.0))
            observer.on_wave(WaveDone(number, 7, 50))
            observer.in_step()
            return reported

    board = ProgressBoard.remote(0, 14)  # type: ignore[attr-defined]
    workers = [Rank.remote() for _ in range(2)]  # type: ignore[attr-defined]
    reports = ray.get([worker.work.remote(board, number) for number, worker in enumerate(workers)])
    assert [report["loss"] for (report,) in reports] == [0.5, 0.5] and reports[1][0]["users"] == 7
    wanted = {(f"ray_plora_train_{name}", str(number)) for name in NAMES for number in range(2)}
    found: dict[tuple[str, str], float] = {}
    deadline = time.monotonic() + 60
    while not wanted <= found.keys() and time.monotonic() < deadline:
        time.sleep(0.2)
        found |= scraped(metrics_url)
    assert wanted <= found.keys()
    assert found["ray_plora_train_rows_total", "1"] == 130 and found["ray_plora_train_users_total", "0"] == 7
    assert found["ray_plora_train_step_seconds", "0"] == pytest.approx(0.2)


def scraped(url: str) -> dict[tuple[str, str], float]:
    """Values of g-test's metrics by name and rank. Fails on a label that isn't the generation, the rank or one of Ray's own."""
    try:
        text = urllib.request.urlopen(url, timeout=5).read().decode()
    except urllib.error.URLError:
        return {}  # the agent isn't up yet
    values = {}
    for name, labels, value in re.findall(r"^(\w*plora_train_\w+)\{(.*?)\} (\S+)$", text, re.MULTILINE):
        tags = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        tags = {name: found for name, found in tags.items() if not name.startswith("otel_scope_")}
        ours = tags.keys() - {"Component", "JobId", "NodeAddress", "SessionName", "Version", "WorkerId", "NodeId", "ActorId", "TaskId"}
        assert ours == {"generation", "rank"}
        if tags["generation"] == "g-test":
            values[name, tags["rank"]] = float(value)
    return values
