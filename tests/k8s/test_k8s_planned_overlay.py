"""The overlay that `plora plan --out` writes is a whole one, with the plan's numbers."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from rendered import K8S, Rendered, build
from typer.testing import CliRunner

from plora_ray.cli import app
from plora_ray.config import parse_settings
from plora_ray.sizing import load_figures, make_plan
from plora_ray.sizing.demand import parse_demand

ARGUMENTS = ["plan", "--users", "1e7", "--model", "bert-base", "--rps", "2000"]


@pytest.fixture(scope="module")
def overlays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of k8s/overlays, to write beside prod."""
    copied = tmp_path_factory.mktemp("checkout") / "k8s"
    shutil.copytree(K8S, copied)
    return copied / "overlays"


@pytest.fixture(scope="module")
def planned(overlays: Path) -> Rendered:
    done = CliRunner().invoke(app, [*ARGUMENTS, "--out", str(overlays / "planned")])
    assert done.exit_code == 0, done.output
    return build(overlays / "planned")


def test_the_written_overlay_holds_the_plans_counts_memory_and_settings(planned: Rendered, custom_resources: Any) -> None:
    plan = make_plan(parse_demand("bert-base", None, users=1e7, rps=2000), load_figures())
    settings = parse_settings(planned.settings_tree())
    assert settings.model.name == "bert-base-uncased" and settings.serving.replica_range[1] == plan.replicas
    assert settings.serving.cache_bytes == plan.cache_bytes and settings.training.num_workers == plan.gpus
    serve, train, nightly = (planned.clusters()[name]["workerGroupSpecs"][0] for name in ("serve", "train", "retrain"))
    assert serve["maxReplicas"] == plan.worker_pods and serve["minReplicas"] == settings.serving.replica_range[0] + 1
    resources = serve["template"]["spec"]["containers"][0]["resources"]
    assert resources["limits"]["cpu"] == str(plan.replica_cpus) == str(round(settings.serving.replica_cpus))
    assert 0 <= int(resources["limits"]["memory"].removesuffix("Gi")) - plan.pod_memory_bytes / 2**30 < 1
    assert {group[name] for group in (train, nightly) for name in ("replicas", "minReplicas", "maxReplicas")} == {plan.gpus}
    for item in planned.objects:
        if item["apiVersion"].startswith("ray.io"):
            assert custom_resources.admit(item)


def test_what_the_plan_does_not_change_is_prods(planned: Rendered, prod: Rendered) -> None:
    changed = {item["metadata"]["name"] for item in planned.objects if item not in prod.objects}
    assert changed == {"plora", "plora-settings", "plora-train", "plora-retrain", "plora-serve"}
    assert planned.settings_tree()["serving"]["auth"] == prod.settings_tree()["serving"]["auth"]


def test_an_overlay_is_never_overwritten_and_never_written_away_from_prod(planned: Rendered, overlays: Path, tmp_path: Path) -> None:
    before = {file: file.read_bytes() for file in overlays.rglob("*") if file.is_file()}
    for out, message in ((overlays / "planned", "exists"), (tmp_path / "alone", "beside it")):
        refused = CliRunner().invoke(app, [*ARGUMENTS, "--out", str(out)])
        assert refused.exit_code == 2 and message in refused.output and refused.output.count("\n") == 1
    assert {file: file.read_bytes() for file in overlays.rglob("*") if file.is_file()} == before
    assert os.listdir(tmp_path) == []
