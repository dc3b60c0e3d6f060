"""The training job: partitions, ranks under Ray Train, progress, and the published generation. Ray Train lives here alone."""

from __future__ import annotations

import os
import tempfile
import time
import uuid
from dataclasses import asdict
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from plora_ray.adapters.fit import UserPrior
from plora_ray.adapters.labels import LabelSpace
from plora_ray.config import Settings, parse_settings
from plora_ray.errors import ConfigError, PloraError
from plora_ray.training.board import ProgressBoard, RankObserver
from plora_ray.training.dry_run import DryRun, dry_run_of
from plora_ray.training.prepare import Prepared, prepare
from plora_ray.training.progress import ProgressLine
from plora_ray.training.publish import Published, finish, publish, stored_report, unchanged
from plora_ray.training.rank import Assignment, run_rank
from plora_ray.training.report import TrainingReport, add_up
from plora_ray.training.runs import Heartbeat
from plora_ray.training.telemetry import Telemetry
from plora_ray.training.telemetry.configured import open_telemetry
from plora_ray.training.telemetry.history import History
from plora_ray.training.watcher import Watcher
from plora_ray.training.waves import Wave

REASON_CHARS = 500
# Ranks may wait for each other as long as the slowest works on its own users; one that is dead is noticed by Ray Train, not by this.
COLLECTIVE_TIMEOUT_S = 7 * 24 * 3600


class TrainingFailed(PloraError):
    """Workers failed more often than training.max_failures allows; the same command goes on where they stopped."""


def _train_loop(config: dict[str, Any]) -> None:
    """What Ray Train runs in every worker."""
    if not config["use_gpu"]:  # on a node with a GPU, too
        os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    context = ray.train.get_context()
    assignment = Assignment(
        settings=parse_settings(config["settings"]),
        fingerprint=config["fingerprint"],
        generation=config["generation"],
        labels=LabelSpace.from_json(config["labels"]),
        partitions_uri=config["partitions_uri"],
        waves=[Wave(**wave) for wave in config["waves"]],
        deepspeed_profile=config["deepspeed_profile"],
        base=config["base"],
    )
    rank, ranks = context.get_world_rank(), context.get_world_size()
    group = [uuid.uuid4().hex]
    dist.broadcast_object_list(group, src=0)
    run_rank(assignment, rank, ranks, RankObserver(config["board"], group[0], rank, assignment.generation, ray.train.report))


def train(settings: Settings, *, dry_run: bool = False) -> Published | DryRun:
    """Run the whole job on the connected Ray cluster and publish a generation. Raises PloraError.

    An unfinished run of the same data and settings in the same store is continued. With dry_run nothing is trained: the rows are
    partitioned, and what would be done is said and returned. Where no user has new data, the base itself is what is published.
    """
    began = time.monotonic()
    with ProgressLine() as line:
        prepared = prepare(settings, line, dry_run=dry_run)
        store, run, assignment = prepared.store, prepared.run, prepared.assignment
        if dry_run:
            workers, _ = _scale(assignment.settings)
            return dry_run_of(prepared, workers if isinstance(workers, int) else workers[0], line)
        if prepared.nothing_to_do:
            return unchanged(prepared, line, seconds=time.monotonic() - began)
        with open_telemetry(settings, store.objects, run.folder, assignment.generation, line.say) as telemetry:
            if store.manifest(assignment.generation) is not None:  # an earlier start was stopped after the commit
                published = finish(prepared, line, seconds=time.monotonic() - began)
                telemetry.finish(*stored_report(store, assignment.generation))
                return published
            history = History(store.objects, run.folder)
            _fit(prepared, line, telemetry, history)
            line.say("adding up the test rows and writing the report ...")
            segments = store.resume(assignment.generation).finished_waves()
            totals = add_up(assignment, run, prepared.stats, segments, store.tombstones().keys())
            seconds = time.monotonic() - began
            report = TrainingReport(
                assignment, prepared.plan, prepared.stats, totals, history, seconds, run.load_calibration(), _prior(prepared)
            )
            published = publish(prepared, report, segments, line, seconds=time.monotonic() - began)
            telemetry.finish(report.values, report.files)
            return published


def _prior(prepared: Prepared) -> UserPrior | None:
    """What users were fitted under, the run's own or the base's; None for a solver that has none."""
    settings = prepared.assignment.settings
    if settings.user_fit().solver != "newton":
        return None
    prior = prepared.run.load_prior()
    if prior is None and prepared.base is not None:
        return UserPrior.from_tensors(prepared.base.reader.shared().tensors)
    return prior


def _fit(prepared: Prepared, line: ProgressLine, telemetry: Telemetry, history: History) -> None:
    settings = prepared.assignment.settings
    writer = prepared.store.resume(prepared.assignment.generation)
    if prepared.base is not None and settings.training.only_users_with_new_data:
        writer.copy_shared(prepared.store.objects.read(prepared.base.reader.manifest.shared.path))
    done = sum(segment.users for segment in writer.finished_waves().values())
    line.users_at_start = done
    if done:
        line.say(f"{done:,} users are finished already and are not trained again")
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # lost only with the driver itself
    board = ProgressBoard.options(scheduling_strategy=here).remote(done, prepared.plan.users)  # type: ignore[attr-defined]
    workers, use_gpu = _scale(settings)
    shown = f"{workers[0]} to {workers[1]}" if isinstance(workers, tuple) else str(workers)
    line.say(f"starting {shown} {'GPU' if use_gpu else 'CPU'} workers ...")
    with (
        tempfile.TemporaryDirectory(prefix="plora-ray-train-") as ray_folder,
        Heartbeat(prepared.run),
        Watcher(board, line, telemetry, history, done),
    ):
        try:
            _trainer(prepared, board, workers, use_gpu, ray_folder).fit()
        except Exception as error:
            raise TrainingFailed(
                f"training stopped: {_reason(error)}; run the same command again to go on from the last finished wave"
            ) from error
    ray.kill(board)


def _trainer(prepared: Prepared, board: Any, workers: int | tuple[int, int], use_gpu: bool, ray_folder: str) -> TorchTrainer:
    """Ray Train's part: who runs where, and starting again. It keeps nothing of ours: ranks go on from their own state in the store.

    ray_folder: where it keeps its own records, a local folder because the store may be what fails.
    """
    settings = prepared.assignment.settings
    return TorchTrainer(
        _train_loop,
        train_loop_config={
            "settings": settings.for_ranks(),
            "fingerprint": prepared.assignment.fingerprint,
            "generation": prepared.assignment.generation,
            "labels": prepared.assignment.labels.to_json(),
            "partitions_uri": prepared.assignment.partitions_uri,
            "waves": [asdict(wave) for wave in prepared.assignment.waves],
            "deepspeed_profile": prepared.assignment.deepspeed_profile,
            "base": prepared.assignment.base,
            "board": board,
            "use_gpu": use_gpu,
        },
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=use_gpu, elastic_resize_monitor_interval_s=settings.training.resize_check_s,
        ),
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if use_gpu else "gloo", timeout_s=COLLECTIVE_TIMEOUT_S),
        run_config=RunConfig(
            name="train-all", storage_path=ray_folder,
            failure_config=FailureConfig(max_failures=settings.training.max_failures),
        ),
    )  # fmt: skip


def _scale(settings: Settings) -> tuple[int | tuple[int, int], bool]:
    """(workers or their range, whether each takes a GPU), with `auto` resolved against the cluster's resources."""
    training, resources = settings.training, ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    use_gpu = gpus > 0 and torch.version.cuda is not None if training.use_gpu == "auto" else training.use_gpu
    if use_gpu and torch.version.cuda is None:
        raise ConfigError("training.use_gpu is true, but the installed torch is a CPU build: install a CUDA build or set it to false")
    if training.num_workers != "auto":
        return training.num_workers, use_gpu
    available = gpus if use_gpu else min(2, int(resources.get("CPU", 1)))
    return max(1, min(available, training.partition_count)), use_gpu


def _reason(error: BaseException) -> str:
    """What stopped the ranks, in one line: an error of ours if there is one, since other ranks only see their connections break."""
    failures = [getattr(failure, "_base_exc", failure) for failure in getattr(error, "worker_failures", {}).values()]
    cause = next((failure for failure in failures if isinstance(failure, PloraError)), error)
    lines = str(cause).strip().splitlines()
    return (lines[-1] if lines else type(cause).__name__)[:REASON_CHARS]
