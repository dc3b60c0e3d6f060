"""What a served application loses, and for how long, when its cluster changes or breaks under steady HTTP load.

    python -m benchmarks.cluster_faults [--json] [--only node ...] [--rate 20]

Three Ray nodes on this machine, as in production: a head without work, HAProxy and replicas on two workers, made-up users. Each
fault gets a cluster of its own: load, the fault, load until every replica stands again, and some more. Restarting the head needs
`redis-server` on the PATH. Progress goes to standard error.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from benchmarks.fault_cluster import USERS, FaultCluster, fault_cluster
from benchmarks.figures import Figure
from benchmarks.made_generation import name_of, texts_of
from benchmarks.open_load import OpenLoad, Tally
from plora_ray.errors import PloraError

REPLICAS = 4
QUIET_S = 15.0  # under load before the fault, and after everything stands again
HEAD_AWAY_S = 10.0
# Two requests to a batch: then four under way are one replica's share, and BUSY ones are work for all four. The defaults of the delays
# are 30 s and 600 s.
AUTOSCALED = {"replicas": [1, 4], "batch_rows": 2, "scale_up_after_s": 5, "scale_down_after_s": 30}
BUSY = 24
FASTER_THAN_ANSWERED = 1000.0

# Yields, while the load goes on, names of moments and the seconds until they came.
Fault = Callable[[FaultCluster, OpenLoad], Iterator[tuple[str, float]]]


@dataclass(frozen=True)
class Scenario:
    """A fault, and the serving settings it happens under."""

    fault: Fault
    serving: Mapping[str, Any]
    redis: bool = False


def rolling_update(cluster: FaultCluster, load: OpenLoad) -> Iterator[tuple[str, float]]:
    """Other settings are deployed over the running ones: every replica is replaced."""
    old = {one.name for one in cluster.application.replicas()}
    began = time.monotonic()
    cluster.deploy({"replicas": REPLICAS, "batch_wait_ms": 3.0})
    cluster.application.wait_for(REPLICAS, without=old)
    yield "until_full_capacity", time.monotonic() - began
    cluster.application.wait_until_gone(old)
    yield "until_the_last_old_replica_is_gone", time.monotonic() - began


def node_lost(cluster: FaultCluster, load: OpenLoad) -> Iterator[tuple[str, float]]:
    """A worker goes without warning, with half of the replicas and one of the two HAProxys; the other worker takes all."""
    gone = cluster.application.on_node(2)
    began = time.monotonic()
    cluster.nodes.remove_node(2)
    cluster.application.wait_for(REPLICAS, without=gone)
    yield "until_full_capacity", time.monotonic() - began


def head_restarted(cluster: FaultCluster, load: OpenLoad) -> Iterator[tuple[str, float]]:
    """The head goes without warning and is started again a while later."""
    before = {one.name for one in cluster.application.replicas()}
    cluster.nodes.lose_head()
    time.sleep(HEAD_AWAY_S)
    began = time.monotonic()
    cluster.nodes.restart_head()
    yield "until_the_head_is_back", time.monotonic() - began
    cluster.application.wait_for(REPLICAS)
    yield "until_full_capacity", time.monotonic() - began
    yield "replicas_replaced", len(before - {one.name for one in cluster.application.replicas()})


def autoscaling(cluster: FaultCluster, load: OpenLoad) -> Iterator[tuple[str, float]]:
    """From one to four replicas as the load grows to BUSY requests under way at any time, and back."""
    quiet, began = load.rate, time.monotonic()
    load.rate, load.most_under_way = FASTER_THAN_ANSWERED, BUSY
    cluster.application.wait_for(4)
    yield "from_one_to_four", time.monotonic() - began
    load.rate, load.most_under_way, began = quiet, math.inf, time.monotonic()
    cluster.application.wait_for(1)
    yield "from_four_to_one", time.monotonic() - began


SCENARIOS = {
    "rolling": Scenario(rolling_update, {"replicas": REPLICAS}),
    "node": Scenario(node_lost, {"replicas": REPLICAS}),
    "head": Scenario(head_restarted, {"replicas": REPLICAS}, redis=True),
    "autoscaling": Scenario(autoscaling, AUTOSCALED),
}


def main(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    only: Annotated[list[str] | None, typer.Option(help=f"What to measure, of {', '.join(SCENARIOS)}; all by default.")] = None,
    rate: Annotated[float, typer.Option(min=1, help="Requests a second.")] = 20.0,
) -> None:
    """Measure and print."""
    for name in only or SCENARIOS:
        if name not in SCENARIOS:
            raise typer.BadParameter(f"there is no fault {name}: {', '.join(SCENARIOS)}")
    try:
        for name in only or SCENARIOS:
            for figure in measured(name, SCENARIOS[name], rate):
                figure.emit(as_json)
    except PloraError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from None


def measured(name: str, scenario: Scenario, rate: float) -> Iterator[Figure]:
    """The scenario's figures: seconds, requests and lost ones, answer times before and from the fault on."""
    begun = time.monotonic()

    def progress(what: str) -> None:
        typer.echo(f"{name} {time.monotonic() - begun:6.1f} s: {what}", err=True)

    progress("starting a head and two workers")
    with fault_cluster(redis=scenario.redis) as cluster:
        replicas = scenario.serving["replicas"]
        cluster.deploy(scenario.serving)
        cluster.application.wait_for(replicas if isinstance(replicas, int) else replicas[0])
        cluster.application.wait_until_answering(cluster.url)
        with OpenLoad(cluster.url, [name_of(user) for user in range(USERS)], texts_of(None, 512), rate) as load:
            progress("all replicas run; load")
            time.sleep(QUIET_S)
            fault_s = time.monotonic()
            moments = []
            progress("the fault")
            for moment in scenario.fault(cluster, load):
                progress(f"{moment[0]} {moment[1]:.1f}")
                moments.append(moment)
            whole_s = time.monotonic()
            time.sleep(QUIET_S)
        before, during = load.tally(0, fault_s), load.tally(fault_s, whole_s)
        after = load.tally(whole_s, time.monotonic())
        progress(f"{before} | {during} | {after}")
    for what, value in moments:
        yield _figure(f"{name}.{what}", value, "replicas" if what.startswith("replicas") else "s")
    for when, tally in (("before", before), ("during", during), ("after", after)):
        yield from _figures(f"{name}.{when}", tally)


def _figures(name: str, tally: Tally) -> Iterator[Figure]:
    yield _figure(f"{name}.sent", tally.sent, "requests")
    yield _figure(f"{name}.lost", sum(tally.lost.values()), "requests")
    for fate, count in tally.lost.items():
        yield _figure(f"{name}.lost.{fate}", count, "requests")
    yield _figure(f"{name}.p50", tally.p50_ms, "ms")
    yield _figure(f"{name}.p99", tally.p99_ms, "ms")


def _figure(name: str, value: float, unit: str) -> Figure:
    return Figure(name, round(value, 2), round(value, 2), round(value, 2), unit, None)


if __name__ == "__main__":
    typer.run(main)
