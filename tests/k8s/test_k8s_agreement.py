"""The manifests agree with the code they run, with each other, and carry no secret."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import ray
import typer
import yaml
from botocore.credentials import EnvProvider  # type: ignore[import-untyped]
from ray.serve.schema import ServeDeploySchema
from rendered import K8S, ROOT, Rendered, environment

from cluster.s3_bucket import main as make_bucket_command
from cluster.serve_environment import haproxy_environment
from plora_ray.cli import app
from plora_ray.config import Settings, parse_settings

SETTINGS_FILE = "/etc/plora/settings.yaml"
OTHERS_IMAGES = {"minio/minio", "redis"}
Object = dict[str, Any]


@pytest.fixture(scope="session")
def settings(rendered: Rendered) -> Settings:
    return parse_settings(rendered.settings_tree())


def serve_config(rendered: Rendered) -> Object:
    config: Object = yaml.safe_load(rendered.one("RayService")["spec"]["serveConfigV2"])
    return config


def jobs(rendered: Rendered) -> list[Object]:
    """The specifications of the training job and of the nightly one."""
    return [rendered.one("RayJob")["spec"], *(cron["spec"]["jobTemplate"] for cron in rendered.all("RayCronJob"))]


def test_jobs_run_the_documented_command_and_the_command_line_accepts_it(prod: Rendered) -> None:
    for job in jobs(prod):
        python, dash_m, module, *arguments = shlex.split(job["entrypoint"])
        assert [python, dash_m, module, *arguments[:2]] == ["python", "-m", "plora_ray.train_all", "--config", SETTINGS_FILE]
        assert importlib.util.find_spec(module) is not None
        command = typer.main.get_command(app).commands["train-all"]  # type: ignore[attr-defined]
        command.make_context("", list(arguments))  # raises a usage error that names what is wrong
    assert arguments[2:] == ["--only-users-with-new-data"]


def test_a_lost_job_is_tried_again_ends_at_last_and_its_cluster_goes_when_it_is_over(rendered: Rendered) -> None:
    for job in jobs(rendered):
        assert job["backoffLimit"] > 0 and job["activeDeadlineSeconds"] > 0
        assert job["shutdownAfterJobFinishes"] is True and job["ttlSecondsAfterFinished"] > 0


def test_the_nightly_job_runs_on_the_training_jobs_cluster(prod: Rendered) -> None:
    once, nightly = jobs(prod)
    assert nightly["rayClusterSpec"] == once["rayClusterSpec"] and nightly["submitterPodTemplate"] == once["submitterPodTemplate"]


def test_the_mounted_settings_are_valid_and_what_others_can_reach_asks_for_tokens(settings: Settings) -> None:
    assert settings.store.uri.startswith("s3://"), "pods share nothing but object storage"
    assert settings.serving.host == "0.0.0.0"
    assert settings.serving.auth.algorithm is not None


def test_every_ray_pod_finds_the_settings_where_job_and_application_look(rendered: Rendered) -> None:
    assert [application["args"] for application in serve_config(rendered)["applications"]] == [{"config": SETTINGS_FILE}]
    for name, template in rendered.ray_templates().items():
        mounts = {mount["name"]: mount for mount in template["spec"]["containers"][0]["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        assert mounts["settings"] == {"name": "settings", "mountPath": str(Path(SETTINGS_FILE).parent), "readOnly": True}, name
        assert volumes["settings"]["configMap"]["name"] == "plora-settings", name


def test_the_service_runs_deployments_serve_yaml(rendered: Rendered) -> None:
    assert serve_config(rendered) == yaml.safe_load((ROOT / "deployments" / "serve.yaml").read_text(encoding="utf-8"))
    parsed = ServeDeploySchema.model_validate(serve_config(rendered))
    assert [application.import_path for application in parsed.applications] == ["deployments.app:build"]


def test_replicas_and_the_personalizer_fit_into_the_workers_at_both_ends(rendered: Rendered, settings: Settings) -> None:
    (group,) = rendered.clusters()["serve"]["workerGroupSpecs"]
    places_per_pod = float(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"]) // settings.serving.replica_cpus
    for pods, replicas in zip((group["minReplicas"], group["maxReplicas"]), settings.serving.replica_range, strict=True):
        assert replicas + 1 <= pods * places_per_pod
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    grows = group["minReplicas"] < group["maxReplicas"]
    assert rendered.clusters()["serve"].get("enableInTreeAutoscaling", False) == grows, "who grows the workers?"
    assert rendered.one("PodDisruptionBudget")["spec"]["minAvailable"] <= max(1, group["minReplicas"] - 1)


def test_there_is_a_worker_for_every_rank_and_a_gpu_if_the_settings_ask_for_it(rendered: Rendered, settings: Settings) -> None:
    (group,) = rendered.clusters()["train"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    has_gpu = "nvidia.com/gpu" in container["resources"]["limits"]
    assert settings.training.num_workers == group["minReplicas"] == group["replicas"]
    assert has_gpu == (settings.training.use_gpu is True) == container["image"].endswith("-cuda")


def test_the_probes_and_the_wait_before_an_end_leave_requests_time(rendered: Rendered, settings: Settings) -> None:
    for name, template in rendered.ray_templates().items():
        container = template["spec"]["containers"][0]
        named = {port["name"] for port in container.get("ports", [])}
        for probe in ("livenessProbe", "readinessProbe"):
            port = container[probe]["httpGet"]["port"]
            assert isinstance(port, int) or port in named, (name, probe)
    worker = rendered.ray_templates()["serve replicas"]["spec"]
    (wait_s, stop_s) = map(int, re.findall(r"\d+", worker["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]))
    assert settings.serving.request_timeout_s < wait_s and wait_s + stop_s < worker["terminationGracePeriodSeconds"]


def test_ports_and_names_agree(rendered: Rendered) -> None:
    accounts = {item["metadata"]["name"] for item in rendered.all("ServiceAccount")}
    for name, template in rendered.ray_templates().items():
        ports = {port["name"]: port["containerPort"] for port in template["spec"]["containers"][0].get("ports", [])}
        assert ports["metrics"] == 8080, name  # what Ray exports to under KubeRay; the network policies name it
        component = template["metadata"]["labels"]["app.kubernetes.io/component"]
        assert component == ("serve" if name.startswith("serve") else "train"), name
        assert template["spec"]["serviceAccountName"] == f"plora-{component}" and f"plora-{component}" in accounts, name
        if component == "serve":
            assert ports["serve"] == serve_config(rendered)["http_options"]["port"], name
    for cluster in rendered.clusters().values():
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0", "the head carries no work"
        assert cluster["rayVersion"] == ray.__version__
    for service in rendered.all("Service"):
        owners = [item for item in [*rendered.all("Deployment"), *rendered.all("StatefulSet")] if _selects(service, item)]
        (owner,) = owners
        (container,) = owner["spec"]["template"]["spec"]["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        for port in service["spec"]["ports"]:
            assert port["port"] == ports[port["targetPort"]]


def test_addresses_name_services_that_are_there(dev: Rendered, prod: Rendered) -> None:
    services = {f"{item['metadata']['name']}:{item['spec']['ports'][0]['port']}" for item in [*dev.all("Service"), *prod.all("Service")]}
    endpoint = parse_settings(dev.settings_tree()).store.endpoint_url
    redis = prod.clusters()["serve"]["gcsFaultToleranceOptions"]["redisAddress"]
    bucket_command = dev.ray_templates()["train head"]["spec"]["initContainers"][0]["command"]
    assert {endpoint, bucket_command[bucket_command.index("--endpoint-url") + 1]} == {"http://plora-s3:9000"}
    assert {"plora-s3:9000", redis.removeprefix("redis://")} == services
    assert bucket_command[:3] == ["python", "-m", make_bucket_command.__module__]
    assert f"s3://{bucket_command[3]}/" in parse_settings(dev.settings_tree()).store.uri


def test_images_are_this_version_of_the_project_and_others_are_pinned(rendered: Rendered) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    for name, container in rendered.containers():
        if "image" not in container:
            assert name.endswith("/autoscaler")  # the operator takes the head's
            continue
        image, _, tag = container["image"].partition(":")
        assert container["imagePullPolicy"] == "IfNotPresent", name
        assert (image, tag) in {("plora-ray", version), ("plora-ray", f"{version}-cuda")} or image in OTHERS_IMAGES, name
        assert re.search(r"\d", tag) and tag != "latest", name


def test_ray_asks_for_a_token_everywhere(rendered: Rendered) -> None:
    assert all(cluster["authOptions"] == {"mode": "token"} for cluster in rendered.clusters().values())
    for name, template in rendered.ray_templates().items():
        assert environment(template["spec"]["containers"][0])["RAY_AUTH_MODE"] == "token", name


def test_head_and_workers_of_the_service_have_the_haproxy_variables(rendered: Rendered) -> None:
    for name, template in rendered.ray_templates().items():
        values = environment(template["spec"]["containers"][0])
        serving = {key: value for key, value in values.items() if key.startswith("RAY_SERVE_")}
        assert serving == (haproxy_environment() if name.startswith("serve") else {}), name


def test_every_variable_is_one_that_the_code_reads(rendered: Rendered, settings: Settings) -> None:
    sources = "".join(file.read_text(encoding="utf-8") for room in ("plora_ray", "deployments") for file in (ROOT / room).rglob("*.py"))
    encryption = settings.store.encryption
    foreign = {
        encryption.key_env if encryption else None,
        "RAY_AUTH_MODE",
        EnvProvider.ACCESS_KEY,
        EnvProvider.SECRET_KEY,
        *haproxy_environment(),
    }
    for name, template in rendered.ray_templates().items():
        for container in [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]:
            for variable in set(environment(container)) - foreign:
                assert f'"{variable}"' in sources, f"{name}: nothing reads {variable}"


def test_keys_and_credentials_come_from_secrets_that_are_listed_and_never_from_the_manifests(rendered: Rendered) -> None:
    assert not rendered.all("Secret")
    listed = "".join(file.read_text(encoding="utf-8") for file in K8S.rglob("kustomization.yaml"))
    for name, container in rendered.containers():
        for variable in container.get("env", []):
            if re.search(r"KEY|AUTH$|PASSWORD|ROOT_USER|AWS_", variable["name"]):
                assert set(variable) == {"name", "valueFrom"} and set(variable["valueFrom"]) == {"secretKeyRef"}, (name, variable["name"])
                reference = variable["valueFrom"]["secretKeyRef"]
                assert reference["name"] in listed and reference["key"] in listed, (name, variable["name"])
    text = json.dumps(rendered.objects)
    assert not re.search(r"BEGIN [A-Z ]*PRIVATE KEY|AKIA[0-9A-Z]{16}", text)


def test_prod_encrypts_and_every_ray_pod_has_the_root_key(prod: Rendered) -> None:
    encryption = parse_settings(prod.settings_tree()).store.encryption
    assert encryption is not None and encryption.key_env is not None
    for name, template in prod.ray_templates().items():
        assert encryption.key_env in environment(template["spec"]["containers"][0]), name


def test_raising_the_settings_version_changes_what_the_operator_compares(rendered: Rendered) -> None:
    for name, template in rendered.ray_templates().items():
        assert ("plora-ray/settings-version" in template["metadata"].get("annotations", {})) == name.startswith("serve"), name


def _selects(service: Object, owner: Object) -> bool:
    return service["spec"]["selector"].items() <= owner["spec"]["template"]["metadata"]["labels"].items()
