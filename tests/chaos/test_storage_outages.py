"""An S3 server that fails for a while: the job rides it out, or stops with one line and goes on later. No wave is fitted twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from plora_ray.errors import StoreError
from plora_ray.store import ObjectStore
from tests.chaos.faulty_s3 import Fault, FaultyS3
from tests.chaos.jobs import Job, assert_whole, write

OUTCOME, SEGMENT = r"PUT .*/waves/\d+", r"PUT .*/segments/\d+"
PARTITIONING = (r"PUT .*/partitions/fragments", r"PUT .*/partitions/partition")
STAGES = (*PARTITIONING, r"PUT .*/population/", OUTCOME, SEGMENT, r"PUT .*/manifest", "DELETE")


def configure(tree: dict[str, Any], s3: FaultyS3, folder: Path) -> Path:
    tree["store"] = {"uri": "s3://plora/adapters", "endpoint_url": s3.endpoint_url}
    tree["training"]["users_per_wave"] = 12
    return write(tree, folder)


def wave_of(request: str) -> str:
    return request.rsplit("/", 1)[1][:5]


def test_a_short_outage_is_ridden_out_a_long_one_stops_the_job_in_one_line_and_the_same_command_goes_on(
    many_waves: dict[str, Any], tmp_path: Path, s3: FaultyS3
) -> None:
    config = configure(many_waves, s3, tmp_path)
    ridden_out = s3.fail("503", r"PUT .*/population/", seconds=3)
    s3.fail("SlowDown", SEGMENT, seconds=3600, spared=3)
    with Job(config, "training.store_retry_s=8", "training.max_failures=0") as job:
        message = job.error()
    assert ridden_out.began_s is not None
    assert "s3://plora/adapters/" in message and "run the same command again" in message
    finished = {wave_of(request) for request in s3.times_delivered(SEGMENT)}
    assert 0 < len(finished) < 24, "the outage has to fall between the first wave and the last"
    s3.heal()
    lost = s3.fail("lost", r"PUT .*/manifest\.json", seconds=1.5)
    broken = s3.fail("reset", SEGMENT, seconds=1.5)
    with Job(config, "training.num_workers=1") as job:
        result = job.published()
    assert lost.began_s is not None and broken.began_s is not None
    assert_whole(config, result)
    fits = {wave_of(request): times for request, times in s3.times_delivered(OUTCOME).items()}
    assert all(fits[wave] == 1 for wave in finished), "a finished wave was fitted twice"
    assert set(s3.times_delivered(SEGMENT).values()) == {1}


@pytest.mark.chaos
@pytest.mark.parametrize("fault", ["503", "SlowDown", "reset", "lost"])
@pytest.mark.parametrize("stage", STAGES)
def test_every_fault_is_ridden_out_at_every_stage(
    many_waves: dict[str, Any], tmp_path: Path, s3: FaultyS3, fault: Fault, stage: str
) -> None:
    config = configure(many_waves, s3, tmp_path)
    outage = s3.fail(fault, stage, seconds=5)
    with Job(config, "training.max_failures=0") as job:
        result = job.published()
    assert outage.began_s is not None
    assert_whole(config, result)
    assert set(s3.times_delivered(OUTCOME).values()) == {1}


@pytest.mark.parametrize("fault", ["503", "SlowDown", "reset", "lost"])
def test_the_store_s_own_calls_ride_out_an_outage_and_change_nothing_twice(s3: FaultyS3, fault: Fault) -> None:
    options = {"key": "k", "secret": "s", "endpoint_url": s3.endpoint_url, "client_kwargs": {"region_name": "us-east-1"}}
    objects = ObjectStore("s3://plora/x", options, retry_s=60)
    objects.write("counter", b"1")
    calls = {
        "create": lambda: objects.create("new", b"mine"),
        "update": lambda: objects.update("counter", lambda data: str(int(data or b"0") + 1).encode()),
        "write": lambda: objects.write("plain", b"1"),
        "list": lambda: objects.list(),
        "read": lambda: objects.read("counter"),
        "delete": lambda: objects.delete("plain"),
    }
    for call in calls.values():
        s3.heal()
        outage = s3.fail(fault, "/plora", seconds=0.4)
        call()
        assert outage.began_s is not None
    s3.heal()
    assert objects.read("new") == b"mine" and objects.read("counter") == b"2" and not objects.exists("plain")


def test_beyond_its_time_a_call_ends_in_one_line_that_names_the_object(s3: FaultyS3) -> None:
    options = {"key": "k", "secret": "s", "endpoint_url": s3.endpoint_url, "client_kwargs": {"region_name": "us-east-1"}}
    s3.fail("503", "/plora", seconds=3600)
    with pytest.raises(StoreError, match=r"can't read s3://plora/x/a: ") as caught:
        ObjectStore("s3://plora/x", options, retry_s=3).read("a")
    assert "\n" not in str(caught.value)
    assert len(s3.failed) > 1
