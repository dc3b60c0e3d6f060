"""What `kustomize build` makes of a folder, in plain Python, for machines without kustomize.

Knows the features that k8s/ uses, and refuses others: resources, components, patches (JSON 6902 and merge), configMapGenerator with
files and without name suffixes, replacements of whole fields, labels and namespace. Custom resources have no merge keys, so a merge
patch replaces lists, as kustomize does there; merge patches of built-in kinds are refused.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]
KNOWN = {
    "apiVersion", "kind", "resources", "components", "patches", "configMapGenerator", "replacements", "labels", "namespace",
}  # fmt: skip
CLUSTER_SCOPED = {"PriorityClass"}


def render(folder: Path) -> list[Object]:
    """Every object of the kustomization in `folder`. Raises ValueError for a feature that isn't known here."""
    return _build(folder, [])


def load(path: Path) -> list[Object]:
    """The objects of a file. Through JSON, so that what a YAML anchor names twice is there twice."""
    return [json.loads(json.dumps(item)) for item in yaml.safe_load_all(path.read_text(encoding="utf-8")) if item]


def _build(folder: Path, objects: list[Object]) -> list[Object]:
    """`objects` (of the kustomization that names this one as a component) and what this one brings, all transformed."""
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
    if unknown := set(kustomization) - KNOWN:
        raise ValueError(f"{folder}: {sorted(unknown)} isn't known to this renderer")
    for name in kustomization.get("resources", []):
        path = folder / name
        objects += render(path) if path.is_dir() else load(path)
    for name in kustomization.get("components", []):
        objects = _build(folder / name, objects)
    for generator in kustomization.get("configMapGenerator", []):
        _generate(folder, generator, objects)
    for patch in kustomization.get("patches", []):
        _patch(patch, objects)
    if namespace := kustomization.get("namespace"):
        for item in objects:
            if item["kind"] == "Namespace":
                item["metadata"]["name"] = namespace
            elif item["kind"] not in CLUSTER_SCOPED:
                item["metadata"]["namespace"] = namespace
    for entry in kustomization.get("labels", []):
        for item in objects:
            item["metadata"].setdefault("labels", {}).update(entry["pairs"])
    for replacement in kustomization.get("replacements", []):
        _replace(replacement, objects)
    names = [(item["kind"], item["metadata"]["name"]) for item in objects]
    if len(names) != len(set(names)):
        raise ValueError(f"{folder}: an object is there twice: {sorted(names)}")
    return objects


def _generate(folder: Path, generator: Object, objects: list[Object]) -> None:
    options = generator.get("options", {})
    if not options.get("disableNameSuffixHash") or set(generator) - {"name", "files", "behavior", "options"}:
        raise ValueError(f"{folder}: configMapGenerator {generator['name']} uses what this renderer doesn't know")
    data = {Path(name).name: (folder / name).read_text(encoding="utf-8") for name in generator["files"]}
    if generator.get("behavior") == "replace":
        (found,) = select(objects, {"kind": "ConfigMap", "name": generator["name"]})
        found["data"] = data
        return
    metadata = {"name": generator["name"]} | ({"labels": dict(options["labels"])} if "labels" in options else {})
    objects.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data})


def select(objects: list[Object], target: Object) -> list[Object]:
    """The objects of a kind and name, both whole regular expressions, as kustomize selects; at least one."""
    if unknown := set(target) - {"kind", "name"}:
        raise ValueError(f"a target by {sorted(unknown)} isn't known to this renderer")
    found = [
        item
        for item in objects
        if re.fullmatch(target["kind"], item["kind"]) and re.fullmatch(target.get("name", ".*"), item["metadata"]["name"])
    ]
    if not found:
        raise ValueError(f"nothing is selected by {target}")
    return found


def _patch(entry: Object, objects: list[Object]) -> None:
    change = yaml.safe_load(entry["patch"])
    if isinstance(change, list):
        for item in select(objects, entry["target"]):
            for operation in change:
                _operate(item, operation)
        return
    (item,) = select(objects, {"kind": change["kind"], "name": change["metadata"]["name"]})
    if not item["kind"].startswith("Ray"):
        raise ValueError(f"a merge patch of a {item['kind']} needs merge keys, which this renderer doesn't know")
    _merge(item, change)


def _operate(item: Object, operation: Object) -> None:
    *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].lstrip("/").split("/")]
    place: Any = item
    for part in parents:
        place = place[int(part) if isinstance(place, list) else part]
    value = copy.deepcopy(operation.get("value"))
    if isinstance(place, list):
        if operation["op"] != "add" or last != "-":
            raise ValueError(f"{operation['op']} {operation['path']} isn't known to this renderer")
        place.append(value)
    elif operation["op"] == "remove":
        del place[last]
    elif operation["op"] == "add" or (operation["op"] == "replace" and last in place):
        place[last] = value
    else:
        raise ValueError(f"{operation['op']} {operation['path']}: not there")


def _merge(item: Object, change: Object) -> None:
    for key, value in change.items():
        if value is None:
            item.pop(key, None)
        elif isinstance(value, dict) and isinstance(item.get(key), dict):
            _merge(item[key], value)
        else:
            item[key] = copy.deepcopy(value)


def _replace(replacement: Object, objects: list[Object]) -> None:
    source = dict(replacement["source"])
    *path, last = source.pop("fieldPath").split(".")
    (place,) = select(objects, source)
    for part in path:
        place = place[part]
    for target in replacement["targets"]:
        for item in select(objects, target["select"]):
            for field in target["fieldPaths"]:
                *parents, end = field.split(".")
                there = item
                for part in parents:
                    there = there.setdefault(part, {})
                there[end] = copy.deepcopy(place[last])
