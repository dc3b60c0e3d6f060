"""The sinks that the settings ask for, and what they need, checked before anything is trained."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from tempfile import TemporaryFile

from plora_ray.config import Settings, TrainingSettings
from plora_ray.errors import ConfigError
from plora_ray.store import ObjectStore
from plora_ray.training.telemetry.mlflow import MlflowSink, check_installed
from plora_ray.training.telemetry.sink import Sink, Telemetry
from plora_ray.training.telemetry.tensorboard import TensorBoardSink


def check_telemetry(settings: TrainingSettings) -> None:
    """Raises ConfigError for a folder that can't be written or a client that isn't installed."""
    if settings.tensorboard_dir is not None:
        try:
            settings.tensorboard_dir.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=settings.tensorboard_dir):
                pass
        except OSError as error:
            raise ConfigError(f"training.tensorboard_dir {settings.tensorboard_dir} can't be written: {error.strerror or error}") from error
    if settings.mlflow is not None:
        check_installed()


def open_telemetry(settings: Settings, objects: ObjectStore, folder: str, generation: str, warn: Callable[[str], None]) -> Telemetry:
    """All sinks of a run whose folder in the store is `folder`. Raises ConfigError or StoreError if one can't begin."""
    sinks: list[Sink] = []
    training = settings.training
    with ExitStack() as opened:  # closes those before the one that can't begin
        if training.tensorboard_dir is not None:
            sinks.append(TensorBoardSink(training.tensorboard_dir / generation))
            opened.callback(sinks[-1].close)
        if training.mlflow is not None:
            sinks.append(MlflowSink(settings, training.mlflow, objects, folder, generation))
        opened.pop_all()
    return Telemetry(sinks, warn)
