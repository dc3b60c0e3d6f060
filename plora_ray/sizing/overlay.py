"""A Kustomize overlay of a plan: over the overlay `prod` beside it, with the plan's counts, memory and settings."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path
from typing import Any

import yaml

from plora_ray.config import parse_settings
from plora_ray.errors import ConfigError
from plora_ray.sizing.demand import Demand
from plora_ray.sizing.plan import GiB, Plan

BASE = "prod"
SERVE_WORKERS = "/spec/rayClusterConfig/workerGroupSpecs/0"
TRAIN_WORKERS = "/spec/rayClusterSpec/workerGroupSpecs/0"
NIGHTLY_WORKERS = "/spec/jobTemplate/rayClusterSpec/workerGroupSpecs/0"
QUIET_SHARE = 0.25  # of the replicas at the busiest time, that run always


def write_overlay(folder: Path, plan: Plan, demand: Demand) -> None:
    """Make `folder` with kustomization.yaml and settings.yaml. Raises ConfigError if it exists or doesn't lie beside `prod`."""
    base = folder.absolute().parent / BASE
    if not (base / "kustomization.yaml").is_file():
        raise ConfigError(f"--out {folder}: an overlay is built on the overlay {BASE} beside it, and {base} isn't one (k8s/overlays/NAME)")
    if folder.exists():
        raise ConfigError(f"--out {folder} exists: remove it or choose another name")
    settings = planned_settings(yaml.safe_load((base / "settings.yaml").read_text(encoding="utf-8")), plan, demand)
    parse_settings(settings)
    with tempfile.TemporaryDirectory(dir=base.parent) as made:
        for name, content in (("settings.yaml", settings), ("kustomization.yaml", kustomization(plan))):
            Path(made, name).write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        os.chmod(made, 0o755)
        os.rename(made, folder)


def planned_settings(tree: dict[str, Any], plan: Plan, demand: Demand) -> dict[str, Any]:
    """The base's settings with the plan's model, adapters, ranks and replicas; the rest stays."""
    model = {"name": demand.model.settings_name} if demand.model.settings_name else {}
    adapter = demand.adapter.model_dump(mode="json", exclude_defaults=True)
    changes = {
        "model": model,
        "adapter": adapter,
        "training": {"num_workers": plan.gpus, "partitions": "auto", "epochs": demand.epochs},
        "serving": {"replicas": list(replica_range(plan)), "replica_cpus": plan.replica_cpus, "cache_bytes": plan.cache_bytes},
    }
    return {**tree, **{section: {**tree.get(section, {}), **values} for section, values in changes.items() if values}}


def replica_range(plan: Plan) -> tuple[int, int]:
    """Fewest and most replicas; the autoscaler moves between them."""
    fewest = max(2, math.ceil(QUIET_SHARE * plan.replicas))
    return fewest, max(plan.replicas, fewest + 1)


def kustomization(plan: Plan) -> dict[str, Any]:
    """The overlay's own file."""
    fewest, most = (replicas + 1 for replicas in replica_range(plan))  # and the Personalizer
    amounts = {"cpu": str(plan.replica_cpus), "memory": f"{math.ceil(plan.pod_memory_bytes / GiB)}Gi"}
    resources = {"op": "replace", "path": f"{SERVE_WORKERS}/template/spec/containers/0/resources"}
    return {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": "plora",
        "resources": [f"../{BASE}"],
        "configMapGenerator": [
            {"name": "plora-settings", "behavior": "replace", "files": ["settings.yaml"], "options": {"disableNameSuffixHash": True}}
        ],
        "patches": [
            _patch(
                "RayService",
                "plora",
                [*_counts(SERVE_WORKERS, fewest, most), {**resources, "value": {"requests": amounts, "limits": amounts}}],
            ),
            _patch("RayJob", "plora-train", _counts(TRAIN_WORKERS, plan.gpus, plan.gpus)),
            _patch("RayCronJob", "plora-retrain", _counts(NIGHTLY_WORKERS, plan.gpus, plan.gpus)),
            _patch("PodDisruptionBudget", "plora-serve", [{"op": "replace", "path": "/spec/minAvailable", "value": fewest - 1}]),
        ],
    }


def _counts(workers: str, fewest: int, most: int) -> list[dict[str, Any]]:
    values = {"replicas": fewest, "minReplicas": fewest, "maxReplicas": most}
    return [{"op": "replace", "path": f"{workers}/{name}", "value": value} for name, value in values.items()]


def _patch(kind: str, name: str, operations: list[dict[str, Any]]) -> dict[str, Any]:
    return {"target": {"kind": kind, "name": name}, "patch": yaml.safe_dump(operations, sort_keys=False)}
