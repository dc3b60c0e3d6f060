"""Processes and nodes that die while waves run: the job goes on by itself or by the same command; nobody is skipped or fitted twice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.local import LocalCluster
from tests.chaos.jobs import FitLog, Job, assert_whole, kill, segments, training_workers, working_processes, write

MORE_WAVES = 3
ELASTIC = ("training.num_workers=[1, 2]", "training.resize_check_s=2")


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalCluster]:
    monkeypatch.setenv("RAY_health_check_period_ms", "500")  # a lost node is noticed in seconds
    with LocalCluster(nodes=2, cpus_per_node=1, dashboard=False) as running:
        yield running


def lose_worker(cluster: LocalCluster, node: int) -> None:
    workers = training_workers(cluster.pid(node))
    assert workers, "no rank of the job runs on this node"
    kill(workers)


def test_an_elastic_job_outlives_a_killed_worker_and_a_removed_node(
    many_waves: dict[str, Any], tmp_path: Path, cluster: LocalCluster
) -> None:
    # So many that waves are left when the lost node is noticed, seconds later.
    many_waves["data"] = {"source": "synthetic://?users=1200&texts=8&pool=80"}
    config, store = write(many_waves, tmp_path), Path(many_waves["store"]["uri"])
    with FitLog(store) as log, Job(config, *ELASTIC, environment=cluster.environment()) as job:
        job.wait_until(lambda: len(segments(store)) >= MORE_WAVES and bool(training_workers(cluster.pid(1))), "waves of two workers")
        finished = segments(store)  # later ones may be under way twice: by a rank that is about to be stopped, and by its successor
        lose_worker(cluster, 1)
        target = len(segments(store)) + 2 * MORE_WAVES  # the other rank may have ended a few that it was at
        job.wait_until(lambda: len(segments(store)) >= target, "waves after the lost worker")
        late = len(segments(store))
        cluster.remove_node(1)
        result = job.published()
    assert late < 600, "the faults came too late to show anything"
    assert "2 ranks" in job.stderr and "1 ranks" in job.stderr
    assert_whole(config, result)
    assert all(log.fits(wave) == 1 for wave in finished), "a finished wave was fitted twice"


@pytest.mark.chaos
def test_an_elastic_job_grows_when_a_node_comes_and_shrinks_when_it_goes(
    many_waves: dict[str, Any], tmp_path: Path, cluster: LocalCluster
) -> None:
    many_waves["data"] = {"source": "synthetic://?users=2000&texts=8&pool=80"}
    config, store = write(many_waves, tmp_path), Path(many_waves["store"]["uri"])
    cluster.remove_node(1)
    with FitLog(store) as log, Job(config, *ELASTIC, environment=cluster.environment()) as job:
        job.wait_until(lambda: len(segments(store)) >= MORE_WAVES, "waves of one worker")
        finished = segments(store)
        added = cluster.add_node()
        job.wait_until(lambda: bool(training_workers(cluster.pid(added))), "a rank on the new node")
        job.wait_until(lambda: len(segments(store)) >= len(finished) + MORE_WAVES, "waves of two workers")
        finished |= segments(store)
        cluster.remove_node(added)
        result = job.published()
    assert_whole(config, result)
    assert all(log.fits(wave) == 1 for wave in finished)


@pytest.mark.chaos
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_killed_driver_s_command_typed_again_goes_on_with_another_number_of_workers(
    many_waves: dict[str, Any], tmp_path: Path, cluster: LocalCluster, before: int, after: int
) -> None:
    config, store = write(many_waves, tmp_path), Path(many_waves["store"]["uri"])
    with FitLog(store) as log:
        with Job(config, f"training.num_workers={before}", environment=cluster.environment()) as job:
            job.wait_until(lambda: len(segments(store)) >= MORE_WAVES, "waves")
            kill([psutil.Process(job.process.pid)])
        finished = segments(store)
        with Job(config, f"training.num_workers={after}", environment=cluster.environment()) as job:
            result = job.published()
    assert "resuming" in job.stderr
    assert_whole(config, result)
    assert all(log.fits(wave) == 1 for wave in finished)


@pytest.mark.chaos
@pytest.mark.parametrize("stage", ["partitions/fragments-*", "partitions/partition-*", "population/*/users-*"])
def test_a_worker_or_task_killed_before_the_waves_costs_nothing_but_time(
    many_waves: dict[str, Any], tmp_path: Path, cluster: LocalCluster, stage: str
) -> None:
    many_waves["training"].update({"epochs": 3, "users_per_wave": 20})
    config, store = write(many_waves, tmp_path), Path(many_waves["store"]["uri"])
    with Job(config, environment=cluster.environment()) as job:
        job.wait_until(lambda: any(store.glob(f"runs/*/{stage}")), stage)
        kill(working_processes(cluster.pid(1)))
        result = job.published()
    assert_whole(config, result)
