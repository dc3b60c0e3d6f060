"""What a running job tells: its history over restarts, TensorBoard files, an MLflow run, and metrics that Prometheus can scrape."""

from __future__ import annotations

import json
import struct
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from plora_ray.config import MlflowSettings, parse_settings
from plora_ray.errors import ConfigError, StoreError
from plora_ray.store import ObjectStore
from plora_ray.store.memory_objects import MemoryObjects
from plora_ray.training.progress import Snapshot, StepPoint
from plora_ray.training.telemetry import Meter, Sample, Telemetry
from plora_ray.training.telemetry.configured import check_telemetry, open_telemetry
from plora_ray.training.telemetry.history import MOST_SAMPLES, History, Start
from plora_ray.training.telemetry.mlflow import MlflowSink, logged_parameters
from plora_ray.training.telemetry.tensorboard import TensorBoardSink

REPORT = {
    "test": {
        "with_user": {"rows": 9, "nll": 0.5},
        "without_user": {"rows": 9, "nll": 0.7},
        "nll_gain": {"mean": 0.2, "low": 0.1, "high": 0.3},
        "user_gains": {"nll": {"edges": [-1.0, 0.0, 1.0, 2.0], "users": [1, 5, 3], "share_better": 0.8}},
    }
}


def step(number: int, seconds: float = 0.0) -> Sample:
    return Sample(
        seconds or float(number), rows=8 * number, rows_per_s=8.0, users_done=0, users_per_s=0.0, step=number, loss=1 / number,
        learning_rate=0.1,
    )  # fmt: skip


def wave(users: int, seconds: float) -> Sample:
    return Sample(seconds, rows=1000, rows_per_s=0.0, users_done=users, users_per_s=2.0)


def test_rates_are_those_of_the_last_ten_seconds_and_what_earlier_starts_did_is_added() -> None:
    meter = Meter(seconds=100.0, rows=5000, users=40)
    assert meter.read(Snapshot(users_done=40), 1.0) == []
    first = meter.read(Snapshot(rows=80, users_done=40, points=[StepPoint(10, 0.7, 0.1)]), 2.0)
    assert [(sample.step, sample.loss, sample.rows, sample.seconds) for sample in first] == [(10, 0.7, 5080, 102.0)]
    points = [StepPoint(10, 0.7, 0.1), StepPoint(20, 0.6, 0.1)]  # the board may send a point again
    assert [sample.step for sample in meter.read(Snapshot(rows=160, users_done=40, points=points), 4.0)] == [20]
    (done,) = meter.read(Snapshot(rows=400, users_done=70, points_before=2), 14.0)
    assert done.step is None and done.users_per_s == pytest.approx(30 / 10) and done.rows_per_s == pytest.approx((400 - 160) / 10)


def test_the_history_goes_on_after_a_restart_and_steps_trained_again_count_once() -> None:
    objects = ObjectStore("memory://telemetry-history")
    killed = History(objects, "runs/a")
    killed.job_began()
    killed.began(Start(0.0, False, "replicated", 400, [400]))
    killed.write([step(10), step(20), step(30)])
    killed.save()
    again = History(objects, "runs/a")
    assert (again.seconds, again.rows, again.restarts) == (30.0, 240, 0)
    again.job_began()
    again.began(Start(30.0, True, "zero3", 400, [200, 200]))
    again.began(Start(30.5, False, "zero3", 400, [200, 200]))
    again.write([step(20, 31.0), step(30, 32.0), wave(5, 33.0), wave(9, 34.0)])
    again.save()
    final = History(objects, "runs/a")
    assert [(sample.step, sample.seconds) for sample in final.samples] == [(10, 10.0), (20, 31.0), (30, 32.0), (None, 33.0), (None, 34.0)]
    assert final.restarts == 2 and final.starts[1].parameter_bytes_held == [200, 200] and final.starts[1].resumed


def test_a_long_history_is_thinned_and_keeps_its_ends() -> None:
    history = History(ObjectStore("memory://telemetry-thinned"), "runs/a")
    for number in range(1, 10_001):
        history.write([step(number)])
    steps = [sample.step or 0 for sample in history.samples]
    assert len(steps) <= MOST_SAMPLES and steps[0] == 1 and steps[-1] == 10_000 and steps == sorted(steps)


def test_a_history_that_cannot_be_kept_is_given_up_long_before_a_result_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    history = History(ObjectStore("memory://telemetry-outage", retry_s=120.0), "runs/a")
    clock = [time.monotonic()]

    def down(*_: object) -> None:
        raise ConnectionError("no route")

    def sleep(seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr(MemoryObjects, "write", down)
    began = clock[0]
    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with pytest.raises(StoreError):
        history.save()
    assert 0 < clock[0] - began <= 5


class Recorder:
    """A sink that fails while told to."""

    name = "recorder"

    def __init__(self, failures: int = 0) -> None:
        self.failures, self.samples, self.ends = failures, list[Sample](), list[str]()

    def write(self, samples: Sequence[Sample]) -> None:
        if self.failures:
            self.failures -= 1
            raise ConnectionError("no route")
        self.samples += samples

    def finish(self, report: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        self.ends.append("finish")

    def close(self) -> None:
        self.ends.append("close")


def test_a_sink_that_fails_is_warned_of_once_misses_nothing_and_holds_nobody_up() -> None:
    failing, sound, lines = Recorder(failures=2), Recorder(), list[str]()
    with Telemetry([failing, sound], lines.append) as telemetry:
        for number in range(1, 6):
            telemetry.write([step(number)])
            while len(sound.samples) < number:  # so that samples come one by one
                time.sleep(0.001)
        telemetry.finish({}, {})
    assert len(lines) == 1 and "recorder" in lines[0] and "no route" in lines[0]
    for sink in (failing, sound):
        assert [sample.step for sample in sink.samples] == [1, 2, 3, 4, 5] and sink.ends == ["finish", "close"]


def events(folder: Path) -> Iterator[Any]:
    """Events of all TensorBoard files: TFRecords of length, checksum, message, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(folder.rglob("events.out.tfevents.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            yield Event.FromString(data[at + 12 : at + 12 + length])
            at += 12 + length + 4


def test_tensorboard_files_hold_the_curves_and_the_histogram_of_gains(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path)
    sink.write([step(10), step(20), wave(7, 25.0)])
    sink.finish(REPORT, {})
    sink.close()
    values = [(value.tag, event.step, value) for event in events(tmp_path) for value in event.summary.value]
    scalars = [(tag, at, value.simple_value) for tag, at, value in values]
    assert [(at, found) for tag, at, found in scalars if tag == "population/loss"] == [(10, pytest.approx(0.1)), (20, pytest.approx(0.05))]
    assert ("throughput/users_done", 25, 7.0) in scalars and ("test/nll/with_user", 0, 0.5) in scalars
    (histogram,) = [value.histo for tag, _, value in values if tag == "gain_per_user/nll"]
    assert list(histogram.bucket) == [1, 5, 3] and list(histogram.bucket_limit) == [0.0, 1.0, 2.0] and histogram.num == 9


def test_an_mlflow_run_gets_parameters_metrics_and_files_and_goes_on_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="the optional extra plora-ray[mlflow] isn't installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    where = MlflowSettings(tracking_uri=(tmp_path / "mlruns").as_uri(), experiment="adapters")
    settings = parse_settings({"training": {"epochs": 2, "mlflow": where.model_dump()}})
    objects = ObjectStore("memory://telemetry-mlflow")
    killed = MlflowSink(settings, where, objects, "runs/a", "g-1")
    killed.write([step(10)])
    killed.close()
    again = MlflowSink(settings, where, objects, "runs/a", "g-1")
    again.write([step(20), wave(7, 25.0)])
    again.finish(REPORT, {"report.json": b"{}", "report.html": b"<!doctype html>"})
    again.close()
    client = mlflow.MlflowClient(where.tracking_uri)
    (run,) = client.search_runs([client.get_experiment_by_name("adapters").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["training.epochs"] == "2"
    assert [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "loss")] == [(10, 0.1), (20, 0.05)]
    assert run.data.metrics["test_with_user_nll"] == 0.5 and run.data.metrics["test_nll_gain"] == 0.2
    assert {item.path for item in client.list_artifacts(run.info.run_id)} == {"report.json", "report.html"}


def test_a_tracking_server_that_does_not_answer_is_refused_before_anything_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="the optional extra plora-ray[mlflow] isn't installed")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    where = MlflowSettings(tracking_uri="http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"http://127.0.0.1:9 can't be used: .*; set training.mlflow to null"):
        MlflowSink(parse_settings({}), where, ObjectStore("memory://telemetry-none"), "runs/a", "g-1")


def test_a_kept_mlflow_run_that_is_gone_is_begun_anew_and_a_silent_server_does_not_stop_a_job_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="the optional extra plora-ray[mlflow] isn't installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    where, settings = MlflowSettings(tracking_uri=(tmp_path / "mlruns").as_uri()), parse_settings({})
    objects = ObjectStore("memory://telemetry-mlflow-gone")
    objects.write("runs/a/mlflow.json", b'{"run_id": "00000000000000000000000000000000"}')
    MlflowSink(settings, where, objects, "runs/a", "g-1").close()
    kept = json.loads(objects.read("runs/a/mlflow.json"))["run_id"]
    client = mlflow.MlflowClient(where.tracking_uri)
    client.delete_run(kept)
    MlflowSink(settings, where, objects, "runs/a", "g-1").close()
    (run,) = client.search_runs([client.get_experiment_by_name("plora").experiment_id])
    assert run.info.run_id == json.loads(objects.read("runs/a/mlflow.json"))["run_id"] != kept
    silent = MlflowSink(settings, MlflowSettings(tracking_uri="http://127.0.0.1:9"), objects, "runs/a", "g-1")
    with pytest.raises(Exception, match="127.0.0.1"):
        silent.write([step(10)])


def test_a_store_that_fails_is_not_called_an_unusable_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="the optional extra plora-ray[mlflow] isn't installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    (tmp_path / "runs").write_text("")  # a file where the run's folder should be
    where = MlflowSettings(tracking_uri=(tmp_path / "mlruns").as_uri())
    with pytest.raises(StoreError, match="mlflow.json"):
        MlflowSink(parse_settings({}), where, ObjectStore(str(tmp_path), retry_s=0), "runs/a", "g-1")


def test_a_sink_that_cannot_begin_closes_those_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = list[str]()
    close = TensorBoardSink.close
    monkeypatch.setattr(TensorBoardSink, "close", lambda sink: (close(sink), closed.append(sink.name)))
    monkeypatch.setitem(sys.modules, "mlflow", None)
    settings = parse_settings({"training": {"tensorboard_dir": str(tmp_path), "mlflow": {"tracking_uri": "http://tracking"}}})
    with pytest.raises(ImportError):
        open_telemetry(settings, ObjectStore("memory://telemetry-close"), "runs/a", "g-1", print)
    assert closed == ["training.tensorboard_dir"]


def test_a_missing_mlflow_client_is_one_line_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    settings = parse_settings({"training": {"mlflow": {"tracking_uri": "http://tracking"}}})
    with pytest.raises(ConfigError, match=r"pip install 'plora-ray\[mlflow\]'"):
        check_telemetry(settings.training)


def test_a_tracking_uri_with_a_password_is_refused_without_repeating_it() -> None:
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD") as caught:
        parse_settings({"training": {"mlflow": {"tracking_uri": "https://me:hunter2@tracking"}}})
    assert "hunter2" not in str(caught.value)


def test_what_may_hold_credentials_is_not_logged_as_a_parameter() -> None:
    tree = {
        "data": {"source": "https://host/rows.parquet?signature=hunter2", "storage_options": {"secret": "hunter2"}},
        "training": {"mlflow": {"tracking_uri": "http://tracking"}},
    }
    logged = logged_parameters(parse_settings(tree))
    assert logged["data.source"] == "https://host/rows.parquet"
    assert logged["training.epochs"] == "3" and not [name for name, value in logged.items() if "hunter2" in value or "mlflow" in name]


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="tensorboard_dir"):
        check_telemetry(parse_settings({"training": {"tensorboard_dir": str(tmp_path / "file" / "below")}}).training)
