"""What an API server does with an object before it stores it, for KubeRay's custom resource definitions."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml
from rendered import K8S, OPTIONAL, ROOT, Rendered, build, laid_over_prod

DEFINITIONS_VARIABLE = "PLORA_KUBERAY_CRDS"


class CustomResources:
    """Admission of KubeRay objects: nulls dropped, defaults filled, unknown fields refused, then the OpenAPI schema."""

    def __init__(self, directory: Path) -> None:
        self._schemas: dict[tuple[str, str], dict[str, Any]] = {}
        for file in sorted(directory.glob("ray.io_*.yaml")):
            spec = yaml.load(file.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)["spec"]  # the plain loader takes half a minute
            for version in spec["versions"]:
                name = (f"{spec['group']}/{version['name']}", spec["names"]["kind"])
                self._schemas[name] = version["schema"]["openAPIV3Schema"]

    def admit(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """The object as it would be stored. Raises ValueError or jsonschema.ValidationError."""
        schema = self._schemas[manifest["apiVersion"], manifest["kind"]]
        stored = _prepare(manifest, schema, manifest["kind"])
        jsonschema.Draft4Validator(schema).validate(stored)
        assert isinstance(stored, dict)
        return stored


def _prepare(value: Any, schema: dict[str, Any], where: str) -> Any:
    if isinstance(value, list) and "items" in schema:
        return [_prepare(item, schema["items"], f"{where}[{index}]") for index, item in enumerate(value)]
    if not isinstance(value, dict) or schema.get("type") != "object":
        return value  # a mapping where another type belongs is the validator's to refuse
    properties, others = schema.get("properties", {}), schema.get("additionalProperties")
    if where.count(".") == 1 and where.endswith(".metadata"):
        return value  # an object's own metadata is checked by the API server's built-in schema
    present = {key: item for key, item in value.items() if item is not None or properties.get(key, {}).get("nullable")}
    if not properties and not others and not schema.get("x-kubernetes-preserve-unknown-fields") and present:
        raise ValueError(f"{where} takes no fields, found {sorted(present)}")
    unknown = sorted(set(present) - set(properties)) if properties and not others else []
    if unknown and not schema.get("x-kubernetes-preserve-unknown-fields"):
        raise ValueError(f"unknown field {where}.{unknown[0]}")
    defaults = {key: item["default"] for key, item in properties.items() if "default" in item and key not in present}
    fallback = others if isinstance(others, dict) else {}
    return {key: _prepare(item, properties.get(key, fallback), f"{where}.{key}") for key, item in {**defaults, **present}.items()}


@pytest.fixture(scope="session")
def custom_resources() -> CustomResources:
    """The definitions beside the checkout, or where the variable says."""
    given = os.environ.get(DEFINITIONS_VARIABLE)
    directory = Path(given) if given else ROOT.parent / "shared" / "kuberay-crds"
    if not (directory / "ray.io_rayjobs.yaml").is_file():
        pytest.fail(
            f"no KubeRay custom resource definitions in {directory}: set {DEFINITIONS_VARIABLE} to a copy of kuberay's "
            "ray-operator/config/crd/bases"
        )
    return CustomResources(directory)


@pytest.fixture(scope="session", params=["dev", "prod", *OPTIONAL])
def rendered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Rendered:
    """Each overlay, and prod with each optional component."""
    if request.param in OPTIONAL:
        return laid_over_prod(request.param, tmp_path_factory.mktemp(request.param))
    return build(K8S / "overlays" / request.param)


@pytest.fixture(scope="session")
def dev() -> Rendered:
    return build(K8S / "overlays" / "dev")


@pytest.fixture(scope="session")
def prod() -> Rendered:
    return build(K8S / "overlays" / "prod")
