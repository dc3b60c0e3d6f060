"""The manifests are objects that Kubernetes and KubeRay accept."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml

BASE = Path(__file__).resolve().parents[2] / "k8s" / "base"
Manifests = dict[str, dict[str, Any]]


@pytest.mark.parametrize("kind", ["RayJob", "RayService"])
def test_kuberay_accepts_the_object(kind: str, manifests: Manifests, custom_resources: Any) -> None:
    stored = custom_resources.admit(manifests[kind])
    assert stored["spec"]


@pytest.mark.parametrize("kind", ["ConfigMap", "ServiceAccount"])
def test_kubernetes_accepts_the_object(kind: str, manifests: Manifests) -> None:
    kubernetes_validate.validate(manifests[kind], kubernetes_validate.latest_version(), strict=True)


def test_kubernetes_accepts_every_pod(pods: Manifests) -> None:
    for name, spec in pods.items():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": re.sub(r"\W", "-", name)}, "spec": spec}
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)


def test_admission_fills_defaults_and_drops_nulls(manifests: Manifests, custom_resources: Any) -> None:
    job = copy.deepcopy(manifests["RayJob"])
    del job["spec"]["submissionMode"]
    job["spec"]["jobId"] = None
    stored = custom_resources.admit(job)
    assert stored["spec"]["submissionMode"] == "K8sJobMode"
    assert "jobId" not in stored["spec"]


def test_a_misspelt_field_is_refused_at_any_depth(manifests: Manifests, custom_resources: Any) -> None:
    job = copy.deepcopy(manifests["RayJob"])
    container = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    container["imagePullpolicy"] = container.pop("imagePullPolicy")
    with pytest.raises(ValueError, match=r"unknown field RayJob\.spec\..*containers\[0\]\.imagePullpolicy"):
        custom_resources.admit(job)


def test_a_value_of_the_wrong_type_is_refused(manifests: Manifests, custom_resources: Any) -> None:
    service = copy.deepcopy(manifests["RayService"])
    service["spec"]["serveConfigV2"] = yaml.safe_load(service["spec"]["serveConfigV2"])
    with pytest.raises(jsonschema.ValidationError):
        custom_resources.admit(service)


def test_the_upgrade_strategy_is_one_that_kuberay_knows(manifests: Manifests) -> None:
    # The schema has no enum for it.
    assert manifests["RayService"]["spec"]["upgradeStrategy"]["type"] in {"NewCluster", "NewClusterWithIncrementalUpgrade", "None"}


def test_the_kustomization_lists_every_object(manifests: Manifests) -> None:
    files = {file.name for file in BASE.glob("*.yaml")} - {"kustomization.yaml"}
    assert set(manifests["Kustomization"]["resources"]) == files
    assert len(manifests) == len(files) + 1, "two objects of one kind: the tests look objects up by kind"
