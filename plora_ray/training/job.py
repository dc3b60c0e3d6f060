"""The training job: partitions, ranks under Ray Train, progress, and the published generation. Ray Train lives here alone."""

from __future__ import annotations

import threading
import time
from dataclasses import asdict
from typing import Any

import ray
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from plora_ray.adapters.labels import LabelSpace
from plora_ray.config import Settings, parse_settings
from plora_ray.errors import ConfigError, PloraError
from plora_ray.training.prepare import Prepared, prepare
from plora_ray.training.progress import ProgressLine, Snapshot
from plora_ray.training.publish import Published, publish
from plora_ray.training.rank import KIND, Assignment, run_rank
from plora_ray.training.waves import Wave

POLL_S = 0.5


class TrainingFailed(PloraError):
    """Workers failed more often than training.max_failures allows; the same command goes on where they stopped."""


@ray.remote(num_cpus=0)
class ProgressBoard:
    """Where ranks note their progress and the driver reads it."""

    def __init__(self, users_done: int, users: int) -> None:
        self._snapshot = Snapshot(users_done=users_done, users=users)
        self._waves: set[int] = set()

    def on_steps(self, step: int, steps: int, loss: float) -> None:
        self._snapshot.step, self._snapshot.steps, self._snapshot.loss = step, steps, loss

    def on_wave(self, users: int, wave: int) -> None:
        if wave not in self._waves:
            self._waves.add(wave)
            self._snapshot.users_done += users

    def on_model(self, line: str) -> None:
        self._snapshot.model = line

    def snapshot(self) -> Snapshot:
        return self._snapshot


class _RankObserver:
    """Tells the board, and Ray Train from every rank, as it asks for."""

    def __init__(self, board: Any, rank: int, ranks: int) -> None:
        self._board, self._rank, self._ranks = board, rank, ranks

    def on_steps(self, step: int, steps: int, loss: float) -> None:
        if self._rank == 0:
            self._board.on_steps.remote(step, steps, loss)

    def on_wave(self, users: int, wave: int) -> None:
        self._board.on_wave.remote(users, wave)

    def on_model(self, sharding: str, parameter_bytes: int, parameter_bytes_held: int) -> None:
        if self._rank == 0:
            whole, held = parameter_bytes / 2**20, parameter_bytes_held / 2**20
            self._board.on_model.remote(f"{self._ranks} ranks, {sharding}: {whole:,.1f} MiB of parameters, {held:,.1f} MiB on each rank")


def _train_loop(config: dict[str, Any]) -> None:
    """What Ray Train runs in every worker."""
    context = ray.train.get_context()
    assignment = Assignment(
        settings=parse_settings(config["settings"]),
        fingerprint=config["fingerprint"],
        generation=config["generation"],
        labels=LabelSpace.from_json(config["labels"]),
        partitions_uri=config["partitions_uri"],
        waves=[Wave(**wave) for wave in config["waves"]],
    )
    rank, ranks = context.get_world_rank(), context.get_world_size()
    run_rank(assignment, rank, ranks, _RankObserver(config["board"], rank, ranks))
    ray.train.report({"rank": rank})


def train(settings: Settings) -> Published:
    """Run the whole job on the connected Ray cluster and publish a generation. Raises PloraError.

    An unfinished run of the same data and settings in the same store is continued.
    """
    began = time.monotonic()
    with ProgressLine() as line:
        prepared = prepare(settings, line)
        if prepared.store.manifest(prepared.assignment.generation) is None:
            _fit(prepared, line)
        return publish(
            prepared.store, prepared.run, prepared.assignment, prepared.stats, prepared.weight_hash, seconds=time.monotonic() - began
        )


def _fit(prepared: Prepared, line: ProgressLine) -> None:
    settings = prepared.assignment.settings
    writer = prepared.store.begin(prepared.assignment.generation, KIND)
    done = sum(segment.users for segment in writer.finished_waves().values())
    line.users_at_start = done
    if done:
        line.say(f"{done:,} users are finished already and are not trained again")
    board = ProgressBoard.remote(done, prepared.stats.train_users)  # type: ignore[attr-defined]
    workers, use_gpu = _scale(settings)
    line.say(f"starting {workers} {'GPU' if use_gpu else 'CPU'} workers ...")
    filesystem, path = prepared.store.objects.arrow_filesystem(f"{prepared.run.folder}/ray")
    trainer = TorchTrainer(
        _train_loop,
        train_loop_config={
            "settings": settings.model_dump(mode="json"),
            "fingerprint": prepared.assignment.fingerprint,
            "generation": prepared.assignment.generation,
            "labels": prepared.assignment.labels.to_json(),
            "partitions_uri": prepared.assignment.partitions_uri,
            "waves": [asdict(wave) for wave in prepared.assignment.waves],
            "board": board,
        },
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu),
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if use_gpu else "gloo"),
        run_config=RunConfig(
            name="train-all", storage_path=path, storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=settings.training.max_failures),
        ),
    )  # fmt: skip
    with _watching(board, line):
        try:
            trainer.fit()
        except Exception as error:
            raise TrainingFailed(
                f"training stopped: {_reason(error)}; run the same command again to go on from the last finished wave"
            ) from error
    ray.kill(board)


def _scale(settings: Settings) -> tuple[int, bool]:
    """(workers, whether each takes a GPU), with `auto` resolved against the cluster's resources."""
    training, resources = settings.training, ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    use_gpu = gpus > 0 and torch.version.cuda is not None if training.use_gpu == "auto" else training.use_gpu
    if use_gpu and torch.version.cuda is None:
        raise ConfigError("training.use_gpu is true, but the installed torch is a CPU build: install a CUDA build or set it to false")
    if training.num_workers != "auto":
        return training.num_workers, use_gpu
    available = gpus if use_gpu else min(2, int(resources.get("CPU", 1)))
    return max(1, min(available, training.partitions)), use_gpu


class _watching:
    """Draws the board's snapshots in a thread while the body runs."""

    def __init__(self, board: Any, line: ProgressLine) -> None:
        self._board, self._line, self._stop = board, line, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._said = ""

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._draw()

    def _watch(self) -> None:
        while not self._stop.wait(POLL_S):
            self._draw()

    def _draw(self) -> None:
        try:
            snapshot: Snapshot = ray.get(self._board.snapshot.remote(), timeout=5)
        except ray.exceptions.RayError:
            return  # the board comes back with its node, or the job fails with a better message
        if snapshot.model and snapshot.model != self._said:
            self._said = snapshot.model
            self._line.say(snapshot.model)
        self._line.show(snapshot)


def _reason(error: BaseException) -> str:
    """The innermost cause in one line."""
    text = str(error).strip().splitlines()
    return (text[-1] if text else type(error).__name__)[:300]
