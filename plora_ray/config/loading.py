"""Settings from a file and overrides, with errors that say what to change."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from plora_ray.config.tree import Settings
from plora_ray.errors import ConfigError


def load_settings(path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Read a YAML file, lay `key.path=value` overrides over it and validate. Raises ConfigError, one line, on anything wrong."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of sections (model, adapter, data, ...), found {type(values).__name__}")
    for override in overrides:
        _apply(values, override)
    return parse_settings(values)


def parse_settings(values: dict[str, Any]) -> Settings:
    """Validate a tree of plain values. Raises ConfigError naming the first wrong key, its value and the nearest valid key."""
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        wrong = [item for item in error.errors() if item["type"] != "default_factory_not_called"]  # a default that hangs on a wrong value
        raise ConfigError("; ".join(_explain(item) for item in wrong[:5])) from error


def _apply(values: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {override!r}: write key.path=value, for example training.epochs=2")
    node = values
    for key in keys[:-1]:
        if not isinstance(node.get(key), dict):
            node[key] = {}
        node = node[key]
    try:
        node[keys[-1]] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {path}: the value is not valid YAML: {text!r}") from error


def _explain(item: Any) -> str:
    location = [str(part) for part in item["loc"]]
    where = ".".join(location)
    if item["type"] == "extra_forbidden":
        valid = _valid_keys(location[:-1])
        near = difflib.get_close_matches(location[-1], valid, n=1, cutoff=0.0)
        return f"unknown setting '{where}': did you mean '{'.'.join([*location[:-1], near[0]])}'?" if near else f"unknown setting '{where}'"
    if item["type"] == "missing":
        return f"setting '{where}' is missing"
    message = item["msg"].removeprefix("Value error, ")
    shown = repr(item["input"])
    named = f"setting '{where}': " if where else ""
    return named + message + (f" (got {shown})" if len(shown) < 80 and not isinstance(item["input"], dict) else "")


def _valid_keys(path: Sequence[str]) -> list[str]:
    model: Any = Settings
    for key in path:
        field = model.model_fields.get(key)
        choices = [] if field is None else get_args(field.annotation) or [field.annotation]  # a section, or a section that may be null
        model = next((choice for choice in choices if isinstance(choice, type) and issubclass(choice, BaseModel)), None)
        if model is None:
            return []
    return list(model.model_fields)
