"""The manifests are objects that Kubernetes, KubeRay and the Prometheus operator accept."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml
from plain_kustomize import render
from rendered import K8S, OPTIONAL, Rendered

SAMPLE = Path(__file__).parent / "kustomize_sample"
# What the Prometheus operator's definitions require of the fields used here; every other field is refused.
MONITORING = {
    "PodMonitor": {
        "required": ["selector", "podMetricsEndpoints"],
        "additionalProperties": False,
        "properties": {
            "selector": {"required": ["matchLabels"], "additionalProperties": False, "properties": {"matchLabels": {"type": "object"}}},
            "podTargetLabels": {"type": "array", "items": {"type": "string"}},
            "podMetricsEndpoints": {
                "type": "array",
                "items": {
                    "required": ["port"],
                    "additionalProperties": False,
                    "properties": {"port": {"type": "string"}, "path": {"pattern": "^/"}, "interval": {"pattern": "^[0-9]+[smh]$"}},
                },
            },
        },
    },
    "PrometheusRule": {
        "required": ["groups"],
        "additionalProperties": False,
        "properties": {
            "groups": {
                "type": "array",
                "items": {
                    "required": ["name", "rules"],
                    "additionalProperties": False,
                    "properties": {
                        "name": {"type": "string"},
                        "rules": {
                            "type": "array",
                            "items": {
                                "required": ["alert", "expr", "labels", "annotations"],
                                "additionalProperties": False,
                                "properties": {
                                    "alert": {"pattern": "^[A-Za-z]+$"},
                                    "expr": {"type": "string"},
                                    "for": {"pattern": "^[0-9]+[smh]$"},
                                    "labels": {"type": "object", "additionalProperties": {"type": "string"}},
                                    "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
                                },
                            },
                        },
                    },
                },
            }
        },
    },
}


def test_the_plain_renderer_makes_what_kustomize_makes() -> None:
    # kustomize_sample uses every feature; expected.yaml is what kustomize 5.5.0 made of it.
    expected = yaml.safe_load_all((SAMPLE / "expected.yaml").read_text(encoding="utf-8"))
    made = render(SAMPLE / "overlay")
    assert {_name(item): item for item in made} == {_name(item): item for item in expected}


def test_the_plain_renderer_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text("namePrefix: x-\n")
    with pytest.raises(ValueError, match="namePrefix"):
        render(tmp_path)


@pytest.fixture(scope="module")
def accepted() -> set[str]:
    """Objects that were accepted already: overlays share most of theirs."""
    return set()


def test_the_cluster_accepts_every_object(rendered: Rendered, custom_resources: Any, accepted: set[str]) -> None:
    new = {text: item for item in rendered.objects if (text := json.dumps(item, sort_keys=True)) not in accepted}
    for item in new.values():
        group = item["apiVersion"].split("/")[0]
        if group == "ray.io":
            assert custom_resources.admit(item)["spec"]
        elif group == "monitoring.coreos.com":
            jsonschema.Draft7Validator(MONITORING[item["kind"]]).validate(item["spec"])
        else:
            kubernetes_validate.validate(item, kubernetes_validate.latest_version(), strict=True)
    accepted.update(new)


def test_kubernetes_accepts_every_pod(rendered: Rendered, accepted: set[str]) -> None:
    new = {text: name for name, template in rendered.templates().items() if (text := json.dumps(template, sort_keys=True)) not in accepted}
    for text, name in new.items():
        template = json.loads(text)
        metadata = {"name": name.replace(" ", "-"), **template["metadata"]}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
    accepted.update(new)


def test_admission_fills_defaults_and_drops_nulls(prod: Rendered, custom_resources: Any) -> None:
    job = copy.deepcopy(prod.one("RayJob"))
    del job["spec"]["submissionMode"]
    job["spec"]["jobId"] = None
    stored = custom_resources.admit(job)
    assert stored["spec"]["submissionMode"] == "K8sJobMode"
    assert "jobId" not in stored["spec"]


def test_a_misspelt_field_is_refused_at_any_depth(prod: Rendered, custom_resources: Any) -> None:
    job = copy.deepcopy(prod.one("RayJob"))
    container = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    container["imagePullpolicy"] = container.pop("imagePullPolicy")
    with pytest.raises(ValueError, match=r"unknown field RayJob\.spec\..*containers\[0\]\.imagePullpolicy"):
        custom_resources.admit(job)


def test_a_value_of_the_wrong_type_is_refused(prod: Rendered, custom_resources: Any) -> None:
    service = copy.deepcopy(prod.one("RayService"))
    service["spec"]["serveConfigV2"] = yaml.safe_load(service["spec"]["serveConfigV2"])
    with pytest.raises(jsonschema.ValidationError):
        custom_resources.admit(service)


def test_the_upgrade_strategy_is_one_that_kuberay_knows(rendered: Rendered) -> None:
    # The schema has no enum for it, and an incremental upgrade without an autoscaler is refused by the operator, not by the schema.
    service = rendered.one("RayService")["spec"]
    strategy = service["upgradeStrategy"]
    incremental = "incremental" in rendered.name
    assert strategy["type"] == ("NewClusterWithIncrementalUpgrade" if incremental else "NewCluster")
    assert ("clusterUpgradeOptions" in strategy) == incremental
    assert not incremental or service["rayClusterConfig"]["enableInTreeAutoscaling"]


def test_every_component_is_part_of_an_overlay_or_optional() -> None:
    named = set()
    for overlay in ("dev", "prod"):
        kustomization = yaml.safe_load((K8S / "overlays" / overlay / "kustomization.yaml").read_text(encoding="utf-8"))
        named |= {Path(name).name for name in kustomization["components"]}
    optional = set(OPTIONAL)
    assert {folder.name for folder in (K8S / "components").iterdir()} == (named - {"size"}) | optional


def _name(item: dict[str, Any]) -> tuple[str, str]:
    return item["kind"], item["metadata"]["name"]
