"""A run at an MLflow tracking server. The mlflow client stands behind this file and is imported only where it is asked for.

A job that resumes goes on with the same MLflow run, whose id lies in the run's folder of the store.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from plora_ray.config import MlflowSettings, Settings
from plora_ray.errors import ConfigError, StoreError
from plora_ray.store import ObjectStore
from plora_ray.training.telemetry.sample import Sample

AT_ONCE = 100  # entries of one request: the smaller of MLflow's limits for parameters and metrics
# The client's own defaults wait for minutes; an outage is bridged here by sending later.
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "15"}


def check_installed() -> None:
    """Raises ConfigError where the client isn't installed."""
    if find_spec("mlflow") is None:
        raise ConfigError("training.mlflow needs the MLflow client: pip install 'plora-ray[mlflow]', or set training.mlflow to null")


class MlflowSink:
    """Begins a run, or goes on with the one whose id is kept, if the server still has it.

    Raises ConfigError if a run can't be begun, and StoreError. For a kept run the server may be silent for now: `write` finds out.
    """

    name = "training.mlflow"

    def __init__(self, settings: Settings, mlflow: MlflowSettings, objects: ObjectStore, folder: str, generation: str) -> None:
        for name, value in _PATIENCE.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        self._finished = False
        try:
            self._client = MlflowClient(mlflow.tracking_uri)
            self._run = self._begin(mlflow.experiment, objects, f"{folder}/mlflow.json", generation, settings)
        except StoreError:
            raise
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise ConfigError(
                f"training.mlflow: {mlflow.tracking_uri} can't be used: {reason}; set training.mlflow to null to go without"
            ) from error

    def write(self, samples: Sequence[Sample]) -> None:
        now = int(time.time() * 1000)
        metrics = [
            (name, float(value), sample.step if sample.step is not None and name in ("loss", "learning_rate") else round(sample.seconds))
            for sample in samples
            for name, value in vars(sample).items()
            if value is not None and name not in ("step", "seconds")
        ]
        self._log(metrics, now)

    def finish(self, report: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
        test = report.get("test", {})
        scores = [
            (f"test_{predictor}_{metric}", float(value), 0)
            for predictor in ("with_user", "without_user", "user_label_prior")
            for metric, value in test.get(predictor, {}).items()
        ]
        gains = [(f"test_{name}", float(gain["mean"]), 0) for name, gain in test.items() if name.endswith("_gain")]
        self._log(scores + gains, int(time.time() * 1000))
        with tempfile.TemporaryDirectory() as folder:
            for name, data in files.items():
                Path(folder, name).write_bytes(data)
            self._client.log_artifacts(self._run, folder)
        self._client.set_terminated(self._run, "FINISHED")
        self._finished = True

    def close(self) -> None:
        if not self._finished:
            self._client.set_terminated(self._run, "FAILED")  # until the same command goes on

    def _begin(self, experiment: str, objects: ObjectStore, path: str, generation: str, settings: Settings) -> str:
        kept = objects.read_many([path]).get(path)
        if kept is not None and self._goes_on(run := str(json.loads(kept)["run_id"])):
            return run
        found = self._client.get_experiment_by_name(experiment)
        place = found.experiment_id if found else self._client.create_experiment(experiment)
        run = self._client.create_run(place, run_name=generation, tags={"generation": generation}).info.run_id
        objects.write(path, json.dumps({"run_id": run}).encode())
        from mlflow.entities import Param

        parameters = [Param(name, value) for name, value in logged_parameters(settings).items()]
        for start in range(0, len(parameters), AT_ONCE):
            self._client.log_batch(run, params=parameters[start : start + AT_ONCE])
        return run

    def _goes_on(self, run: str) -> bool:
        """Whether to go on with a kept run: only the server's word that it is gone speaks against it."""
        try:
            if self._client.get_run(run).info.lifecycle_stage == "deleted":
                return False
            self._client.update_run(run, status="RUNNING")
        except Exception as error:
            return bool(getattr(error, "error_code", "") != "RESOURCE_DOES_NOT_EXIST")
        return True

    def _log(self, metrics: Sequence[tuple[str, float, int]], now_ms: int) -> None:
        from mlflow.entities import Metric

        for start in range(0, len(metrics), AT_ONCE):
            some = [Metric(name, value, now_ms, step) for name, value, step in metrics[start : start + AT_ONCE]]
            self._client.log_batch(self._run, metrics=some)


def logged_parameters(settings: Settings) -> dict[str, str]:
    """The settings that shape training, by dotted key; none that may hold a credential."""
    values = settings.published()
    flat: dict[str, str] = {}

    def walk(prefix: str, node: object) -> None:
        if isinstance(node, dict):
            for name, value in node.items():
                walk(f"{prefix}.{name}" if prefix else name, value)
        else:
            flat[prefix] = str(node)[:500]

    walk("", values)
    return flat
