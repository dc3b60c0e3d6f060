"""A kustomization's objects, as `kubectl apply -k` would send them, and what tests ask of them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from plain_kustomize import render

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "k8s"
# Optional parts, each laid over prod.
OPTIONAL = ("kueue", "incremental-upgrade", "aws-irsa", "gke-workload-identity")
Object = dict[str, Any]


@dataclass(frozen=True)
class Rendered:
    """All objects of one kustomization."""

    name: str
    objects: list[Object]

    def one(self, kind: str, name: str | None = None) -> Object:
        """The only object of this kind, or of this kind and name."""
        (found,) = [item for item in self.objects if item["kind"] == kind and name in (None, item["metadata"]["name"])]
        return found

    def all(self, kind: str) -> list[Object]:
        return [item for item in self.objects if item["kind"] == kind]

    def clusters(self) -> dict[str, Object]:
        """Every RayCluster specification: train, serve, and retrain where it is."""
        found = {"train": self.one("RayJob")["spec"]["rayClusterSpec"], "serve": self.one("RayService")["spec"]["rayClusterConfig"]}
        for cron in self.all("RayCronJob"):
            found["retrain"] = cron["spec"]["jobTemplate"]["rayClusterSpec"]
        return found

    def ray_templates(self) -> dict[str, Object]:
        """Every pod template of a Ray cluster, as "serve head" or "train ranks"."""
        found = {}
        for name, cluster in self.clusters().items():
            found[f"{name} head"] = cluster["headGroupSpec"]["template"]
            for group in cluster["workerGroupSpecs"]:
                found[f"{name} {group['groupName']}"] = group["template"]
        return found

    def templates(self) -> dict[str, Object]:
        """Every pod template there is."""
        jobs = {"train submitter": self.one("RayJob")["spec"]}
        for cron in self.all("RayCronJob"):
            jobs["retrain submitter"] = cron["spec"]["jobTemplate"]
        submitters = {name: job["submitterPodTemplate"] for name, job in jobs.items()}
        others = {item["metadata"]["name"]: item["spec"]["template"] for kind in ("Deployment", "StatefulSet") for item in self.all(kind)}
        return {**self.ray_templates(), **submitters, **others}

    def containers(self) -> Iterator[tuple[str, Object]]:
        """Every container with a readable name, the autoscaler beside the head included."""
        for name, template in self.templates().items():
            for container in [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]:
                yield f"{name}/{container['name']}", container
        for name, cluster in self.clusters().items():
            if "autoscalerOptions" in cluster:
                yield f"{name} head/autoscaler", cluster["autoscalerOptions"]

    def settings_tree(self) -> Object:
        tree: Object = yaml.safe_load(self.one("ConfigMap", "plora-settings")["data"]["settings.yaml"])
        return tree


def environment(container: Mapping[str, Any]) -> dict[str, str | None]:
    """Names and plain values; None where the value comes from elsewhere."""
    return {variable["name"]: variable.get("value") for variable in container.get("env", [])}


def build(folder: Path, name: str = "") -> Rendered:
    """Rendered by kustomize or kubectl where one is installed, by the plain renderer elsewhere."""
    for program in (["kustomize", "build"], ["kubectl", "kustomize"]):
        if shutil.which(program[0]):
            text = subprocess.run([*program, str(folder)], capture_output=True, text=True, check=True, timeout=60).stdout
            return Rendered(name or folder.name, list(yaml.safe_load_all(text)))
    return Rendered(name or folder.name, render(folder))


def laid_over_prod(component: str, folder: Path) -> Rendered:
    """prod with one optional component, through a kustomization written into `folder`."""
    prod, optional = (os.path.relpath(K8S / part, folder) for part in ("overlays/prod", f"components/{component}"))
    (folder / "kustomization.yaml").write_text(yaml.safe_dump({"resources": [prod], "components": [optional]}))
    return build(folder, f"prod with {component}")
