"""The manifests agree with the code they run, with each other, and carry no secret."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from botocore.credentials import EnvProvider  # type: ignore[import-untyped]
from ray.serve.schema import ServeDeploySchema

from cluster.serve_environment import haproxy_environment
from plora_ray.config import parse_settings

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "k8s" / "base"
SETTINGS_FILE = "/etc/plora/settings.yaml"
IMAGE = "plora-ray:0.1.0"
Manifests = dict[str, dict[str, Any]]


@pytest.fixture
def ray_pods(pods: Manifests) -> Manifests:
    return {name: spec for name, spec in pods.items() if name != "train submitter"}


@pytest.fixture
def serve_config(manifests: Manifests) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(manifests["RayService"]["spec"]["serveConfigV2"])
    return config


def test_the_job_runs_the_documented_command_and_the_command_line_accepts_it(manifests: Manifests) -> None:
    entrypoint = manifests["RayJob"]["spec"]["entrypoint"]
    assert entrypoint == f"python -m plora_ray.train_all --config {SETTINGS_FILE}"
    _, *arguments = shlex.split(entrypoint)
    shown = subprocess.run([sys.executable, *arguments, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert shown.returncode == 0, shown.stderr
    assert "--config" in shown.stdout


def test_a_lost_job_is_tried_again_and_its_cluster_goes_when_it_is_over(manifests: Manifests) -> None:
    spec = manifests["RayJob"]["spec"]
    assert spec["backoffLimit"] > 0
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0


def test_the_mounted_settings_are_valid(manifests: Manifests) -> None:
    settings = parse_settings(yaml.safe_load(manifests["ConfigMap"]["data"]["settings.yaml"]))
    assert settings.store.uri.startswith("s3://"), "pods share nothing but object storage"
    assert settings.serving.host == "0.0.0.0"
    assert settings.serving.auth.algorithm is not None, "a service that others can reach must ask for tokens"


def test_every_ray_pod_finds_the_settings_where_job_and_application_look(
    manifests: Manifests, ray_pods: Manifests, serve_config: dict[str, Any]
) -> None:
    assert [application["args"] for application in serve_config["applications"]] == [{"config": SETTINGS_FILE}]
    for name, spec in ray_pods.items():
        mounts = {mount["name"]: mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"]}
        volumes = {volume["name"]: volume["configMap"]["name"] for volume in spec["volumes"]}
        assert mounts == {"settings": str(Path(SETTINGS_FILE).parent)}, name
        assert volumes == {"settings": manifests["ConfigMap"]["metadata"]["name"]}, name


def test_the_service_runs_deployments_serve_yaml(serve_config: dict[str, Any]) -> None:
    assert serve_config == yaml.safe_load((ROOT / "deployments" / "serve.yaml").read_text(encoding="utf-8"))
    parsed = ServeDeploySchema.model_validate(serve_config)
    assert [application.import_path for application in parsed.applications] == ["deployments.app:build"]


def test_replicas_fit_into_the_workers(manifests: Manifests) -> None:
    serving = parse_settings(yaml.safe_load(manifests["ConfigMap"]["data"]["settings.yaml"])).serving
    (group,) = manifests["RayService"]["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    per_pod = float(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    replicas = serving.replicas + 1  # and the Personalizer
    assert replicas <= group["minReplicas"] * (per_pod // serving.replica_cpus)


def test_ports_and_names_agree(manifests: Manifests, ray_pods: Manifests, serve_config: dict[str, Any]) -> None:
    for name, spec in ray_pods.items():
        ports = {port["name"]: port["containerPort"] for port in spec["containers"][0].get("ports", [])}
        if name.startswith("serve"):
            assert ports["serve"] == serve_config["http_options"]["port"], name
        assert spec["serviceAccountName"] == manifests["ServiceAccount"]["metadata"]["name"], name
    for cluster in (manifests["RayJob"]["spec"]["rayClusterSpec"], manifests["RayService"]["spec"]["rayClusterConfig"]):
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0", "the head carries no work"


def test_all_pods_run_one_pinned_image_without_root(pods: Manifests) -> None:
    for name, spec in pods.items():
        (container,) = spec["containers"]
        assert container["image"] == IMAGE, name
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert container["securityContext"]["allowPrivilegeEscalation"] is False, name
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, name
        assert set(container["resources"]) == {"requests", "limits"}, name
    assert not [file.name for file in BASE.glob("*.yaml") if ":latest" in file.read_text(encoding="utf-8")]


def test_every_ray_container_is_probed(ray_pods: Manifests) -> None:
    for name, spec in ray_pods.items():
        container = spec["containers"][0]
        named = {port["name"] for port in container.get("ports", [])}
        for probe in ("livenessProbe", "readinessProbe"):
            port = container[probe]["httpGet"]["port"]
            assert isinstance(port, int) or port in named, (name, probe)


def test_ray_asks_for_a_token_everywhere(manifests: Manifests, ray_pods: Manifests) -> None:
    for cluster in (manifests["RayJob"]["spec"]["rayClusterSpec"], manifests["RayService"]["spec"]["rayClusterConfig"]):
        assert cluster["authOptions"] == {"mode": "token"}
    for name, spec in ray_pods.items():
        assert _environment(spec).get("RAY_AUTH_MODE") == "token", name


def test_head_and_workers_of_the_service_have_the_haproxy_variables(ray_pods: Manifests) -> None:
    for name in [name for name in ray_pods if name.startswith("serve")]:
        serving = {key: value for key, value in _environment(ray_pods[name]).items() if key.startswith("RAY_SERVE_")}
        assert serving == haproxy_environment(), name


def test_every_variable_is_one_that_the_code_reads(pods: Manifests) -> None:
    sources = "".join(file.read_text(encoding="utf-8") for room in ("plora_ray", "deployments") for file in (ROOT / room).rglob("*.py"))
    foreign = {"RAY_AUTH_MODE", EnvProvider.ACCESS_KEY, EnvProvider.SECRET_KEY, *haproxy_environment()}
    for name, spec in pods.items():
        for variable in set(_environment(spec)) - foreign:
            assert f'"{variable}"' in sources, f"{name}: nothing reads {variable}"


def test_keys_and_credentials_come_from_secrets_only(manifests: Manifests, pods: Manifests) -> None:
    assert "Secret" not in manifests
    for name, spec in pods.items():
        for variable in spec["containers"][0].get("env", []):
            if variable["name"].endswith("_KEY") or variable["name"].startswith("AWS_"):
                assert "value" not in variable, (name, variable["name"])
                assert set(variable["valueFrom"]) == {"secretKeyRef"}, (name, variable["name"])


def test_the_secrets_to_bring_are_listed_in_the_kustomization(pods: Manifests) -> None:
    text = (BASE / "kustomization.yaml").read_text(encoding="utf-8")
    for spec in pods.values():
        for variable in spec["containers"][0].get("env", []):
            if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
                assert reference["name"] in text
                assert reference["key"] in text


def _environment(spec: dict[str, Any]) -> dict[str, str | None]:
    return {variable["name"]: variable.get("value") for variable in spec["containers"][0].get("env", [])}
