"""What a platform review asks of the manifests: least rights, closed ports, disruption, priority."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from rendered import Rendered

Object = dict[str, Any]
OURS = {"app.kubernetes.io/part-of": "plora-ray"}
STRANGER: dict[str, str] = {"app": "stranger"}
OPERATOR = {"app.kubernetes.io/name": "kuberay-operator"}


class Network:
    """Which connections a set of NetworkPolicies lets through, as the API's documentation defines them: pods that no policy selects
    are open; a selected pod takes the union of what its policies list; a connection needs the consent of both ends."""

    def __init__(self, rendered: Rendered) -> None:
        self._policies = [item["spec"] for item in rendered.all("NetworkPolicy")]
        self._namespace = rendered.one("Namespace")["metadata"]["name"]

    def reaches(self, source: dict[str, str], target: dict[str, str], port: int, *, namespace: str | None = None) -> bool:
        """Whether a pod labelled `source`, of another namespace if one is given, reaches a pod of ours on a TCP port."""
        home = namespace or self._namespace
        let_in = self._lets(target, "Ingress", source, home, port)
        return let_in if namespace is not None else let_in and self._lets(source, "Egress", target, home, port)

    def _lets(self, pod: dict[str, str], direction: str, other: dict[str, str], home: str, port: int) -> bool:
        policies, peers = self._of(pod, direction), {"Ingress": "from", "Egress": "to"}[direction]
        rules = [rule for policy in policies for rule in policy.get(direction.lower(), []) if self._has_port(rule, port)]
        return not policies or any(peers not in rule or any(self._is(peer, other, home) for peer in rule[peers]) for rule in rules)

    def leaves(self, source: dict[str, str], address: str, port: int) -> bool:
        """Whether a pod of ours reaches an address outside on a TCP port."""
        for policy in self._of(source, "Egress"):
            for rule in policy.get("egress", []):
                blocks = [peer["ipBlock"] for peer in rule.get("to", []) if "ipBlock" in peer]
                inside = any(
                    ip_address(address) in ip_network(block["cidr"])
                    and not any(ip_address(address) in ip_network(hole) for hole in block.get("except", []))
                    for block in blocks
                )
                if self._has_port(rule, port) and (inside or "to" not in rule):
                    return True
        return False

    def _of(self, labels: dict[str, str], direction: str) -> list[Object]:
        return [
            policy
            for policy in self._policies
            if direction in policy["policyTypes"] and policy["podSelector"]["matchLabels"].items() <= labels.items()
        ]

    @staticmethod
    def _has_port(rule: Object, port: int) -> bool:
        return "ports" not in rule or any(entry["port"] == port and entry["protocol"] == "TCP" for entry in rule["ports"])

    def _is(self, peer: Object, labels: dict[str, str], namespace: str) -> bool:
        if "ipBlock" in peer:
            return False  # pods are known by their labels here
        wanted = peer.get("namespaceSelector")
        names = {"kubernetes.io/metadata.name": namespace}
        there = namespace == self._namespace if wanted is None else wanted.get("matchLabels", {}).items() <= names.items()
        return bool(there and peer.get("podSelector", {}).get("matchLabels", {}).items() <= labels.items())


def ray_pod(component: str, node: str) -> dict[str, str]:
    """The labels that a Ray pod has in the end: the template's and the operator's."""
    return {**OURS, "app.kubernetes.io/component": component, "ray.io/node-type": node, "ray.io/is-ray-node": "yes"}


HEAD, REPLICA, TRAIN_HEAD, RANK = ray_pod("serve", "head"), ray_pod("serve", "worker"), ray_pod("train", "head"), ray_pod("train", "worker")
# GCS, dashboard, Ray client, replicas' own ports behind HAProxy, metrics, HAProxy's metrics and statistics
CLOSED = (6379, 8265, 10001, 30000, 8080, 9101, 8404)


@pytest.fixture(scope="session")
def network(rendered: Rendered) -> Network:
    return Network(rendered)


def test_strangers_reach_the_serving_port_and_nothing_else(network: Network) -> None:
    for namespace in (None, "elsewhere"):
        assert network.reaches(STRANGER, REPLICA, 8000, namespace=namespace)
        for target in (HEAD, REPLICA, TRAIN_HEAD, RANK):
            assert not [port for port in CLOSED if network.reaches(STRANGER, target, port, namespace=namespace)]
        assert not network.reaches(STRANGER, RANK, 8000, namespace=namespace)


def test_a_ray_cluster_reaches_itself_and_not_the_other_one(network: Network) -> None:
    assert network.reaches(HEAD, REPLICA, 10002) and network.reaches(REPLICA, HEAD, 6379)
    assert network.reaches(RANK, TRAIN_HEAD, 6379) and network.reaches(RANK, RANK, 29500)
    assert not network.reaches(RANK, HEAD, 6379) and not network.reaches(REPLICA, TRAIN_HEAD, 8265)


def test_the_submitter_and_the_operator_reach_the_dashboard(network: Network) -> None:
    assert network.reaches({**OURS, "app.kubernetes.io/component": "train"}, TRAIN_HEAD, 8265)
    for head in (HEAD, TRAIN_HEAD):
        assert network.reaches(OPERATOR, head, 8265, namespace="kuberay")
        assert not network.reaches(OPERATOR, head, 10001, namespace="kuberay")


def test_object_storage_is_reached_and_the_nodes_own_role_is_not(network: Network, rendered: Rendered) -> None:
    for pod in (HEAD, REPLICA, TRAIN_HEAD, RANK):
        assert network.leaves(pod, "52.95.1.1", 443) and not network.leaves(pod, "52.95.1.1", 22)
        assert not network.leaves(pod, "169.254.169.254", 443)
        assert network.leaves(pod, "169.254.169.254", 80) == ("gke" in rendered.name)


def test_the_overlays_own_servers_are_reached_by_whom_they_serve_only(dev: Rendered, prod: Rendered) -> None:
    s3, redis = ({**OURS, "app.kubernetes.io/component": name} for name in ("s3-server", "redis"))
    assert Network(dev).reaches(RANK, s3, 9000) and not Network(dev).reaches(STRANGER, s3, 9000)
    assert Network(prod).reaches(HEAD, redis, 6379)
    assert not Network(prod).reaches(RANK, redis, 6379) and not Network(prod).reaches(STRANGER, redis, 6379)


def test_prometheus_reaches_the_metrics(prod: Rendered) -> None:
    for target in (HEAD, REPLICA, RANK):
        assert Network(prod).reaches({"app": "prometheus"}, target, 8080, namespace="monitoring")
    monitor = prod.one("PodMonitor")["spec"]
    assert monitor["selector"]["matchLabels"].items() <= REPLICA.items()
    (endpoint,) = monitor["podMetricsEndpoints"]
    for name, template in prod.ray_templates().items():
        assert endpoint["port"] in {port["name"] for port in template["spec"]["containers"][0]["ports"]}, name


def test_every_pod_meets_the_restricted_pod_security_standard_on_a_read_only_root(rendered: Rendered) -> None:
    assert rendered.one("Namespace")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for name, template in rendered.templates().items():
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True and spec["securityContext"]["runAsUser"] > 0, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec), name
        kinds = {next(iter(set(volume) - {"name"})) for volume in spec.get("volumes", [])}
        assert kinds <= {"configMap", "emptyDir", "projected", "persistentVolumeClaim", "secret"}, name
        assert template["metadata"]["labels"].items() >= OURS.items(), f"{name}: no network policy finds it"
    for name, container in rendered.containers():
        security = container["securityContext"]
        assert security == {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}, name
        assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}, f"{name}: nowhere to write"


def test_every_container_says_what_it_needs_and_gets_no_more_memory_than_it_asked_for(rendered: Rendered) -> None:
    for name, container in rendered.containers():
        assert set(container["resources"]) == {"requests", "limits"}, name
        assert {"cpu", "memory"} <= set(container["resources"]["requests"]) & set(container["resources"]["limits"]), name
    for name, template in rendered.ray_templates().items():
        resources = template["spec"]["containers"][0]["resources"]
        assert resources["requests"]["memory"] == resources["limits"]["memory"], name


def test_only_the_autoscaler_holds_a_token_for_the_kubernetes_api(rendered: Rendered) -> None:
    for item in rendered.all("ServiceAccount"):
        assert item["automountServiceAccountToken"] is False
    holders = {
        name
        for name, container in rendered.containers()
        if any(mount["mountPath"].startswith("/var/run/secrets/kubernetes.io") for mount in container.get("volumeMounts", []))
    }
    for name, template in rendered.templates().items():
        assert template["spec"]["automountServiceAccountToken"] is False, name
    assert holders == (set() if rendered.name == "dev" else {"serve head/autoscaler"})


def test_a_cloud_role_is_tied_to_each_account(rendered: Rendered) -> None:
    keys = {"prod with aws-irsa": "eks.amazonaws.com/role-arn", "prod with gke-workload-identity": "iam.gke.io/gcp-service-account"}
    for account in rendered.all("ServiceAccount"):
        annotations = account["metadata"].get("annotations", {})
        assert set(annotations) == {keys[rendered.name]} if rendered.name in keys else not annotations
        assert all(account["metadata"]["name"] in value for value in annotations.values())


def test_the_disruption_budget_guards_the_workers_that_answer(rendered: Rendered) -> None:
    budget = rendered.one("PodDisruptionBudget")["spec"]
    labels = budget["selector"]["matchLabels"].items()
    assert labels <= REPLICA.items() and not labels <= HEAD.items() and not labels <= RANK.items()
    # A percentage or maxUnavailable needs a controller with a scale, which Ray's pods don't have.
    assert isinstance(budget["minAvailable"], int) and "maxUnavailable" not in budget


def test_serving_goes_before_training_when_the_cluster_is_full(prod: Rendered) -> None:
    classes = {item["metadata"]["name"]: item for item in prod.all("PriorityClass")}
    assert classes["plora-serve"]["value"] > classes["plora-train"]["value"]
    assert classes["plora-train"]["preemptionPolicy"] == "Never"
    for name, template in prod.ray_templates().items():
        assert template["spec"]["priorityClassName"] == ("plora-serve" if name.startswith("serve") else "plora-train"), name


def test_replicas_are_spread_over_nodes_and_zones_and_the_head_is_no_backend(rendered: Rendered) -> None:
    worker = rendered.ray_templates()["serve replicas"]["spec"]
    for spread in worker["topologySpreadConstraints"]:
        assert spread["labelSelector"]["matchLabels"].items() <= REPLICA.items()
    assert {spread["topologyKey"] for spread in worker["topologySpreadConstraints"]} == {
        "kubernetes.io/hostname",
        "topology.kubernetes.io/zone",
    }
    assert rendered.one("RayService")["spec"]["excludeHeadPodFromServeSvc"] is True


def test_the_serving_head_of_prod_survives_in_redis_behind_a_password(prod: Rendered) -> None:
    options = prod.clusters()["serve"]["gcsFaultToleranceOptions"]
    (redis,) = prod.all("StatefulSet")
    (container,) = redis["spec"]["template"]["spec"]["containers"]
    assert options["redisPassword"]["valueFrom"] == container["env"][0]["valueFrom"]
    assert "--appendonly yes" in container["command"][-1] and "requirepass" in container["command"][-1]


def test_a_queued_job_is_handed_over_suspended(rendered: Rendered) -> None:
    job = rendered.one("RayJob")
    queued = "kueue.x-k8s.io/queue-name" in job["metadata"]["labels"]
    assert queued == (rendered.name == "prod with kueue") == job["spec"].get("suspend", False)
