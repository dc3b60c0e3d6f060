"""The documentation is true wherever a program can tell: links, settings, commands, examples, and the tests it names."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
import types
import typing
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from pydantic import BaseModel, TypeAdapter
from pydantic_core import PydanticUndefined

from plora_ray.cli import app
from plora_ray.config import Settings, load_settings, parse_settings

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "cluster").rglob("*.md"))]
SETTINGS_TABLES = {"docs/train.md": "All settings", "docs/serve.md": "Settings", "docs/evaluate.md": "Settings"}

of_every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def prose(page: Path) -> str:
    """The page without its fenced code."""
    return re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def fenced(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def inline_code(page: Path) -> list[str]:
    """What stands between backticks in a paragraph or a table, on one line."""
    found = re.findall(r"`([^`]+)`", re.sub(r"^    .*$", "", prose(page), flags=re.MULTILINE))
    return [" ".join(code.split()) for code in found]


def block_lines(page: Path) -> list[str]:
    """The lines of indented code."""
    return [line.strip() for line in re.findall(r"^    (.*)$", prose(page), re.MULTILINE)]


def anchors(page: Path) -> set[str]:
    """The anchors that a Markdown renderer gives to the page's headings."""
    seen: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#+ +(.+?) *$", prose(page), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


@of_every_page
def test_every_link_leads_to_a_file_and_a_heading_that_exist(page: Path) -> None:
    text = re.sub(r"`[^`]+`", "", prose(page))
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{target}: no such file"
        assert not anchor or anchor in anchors(there), f"{target}: no such heading, but {sorted(anchors(there))}"


def settings_and_defaults(
    section: type[BaseModel] = Settings, values: BaseModel | None = None, prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Every leaf of the settings tree with its default as JSON has it; PydanticUndefined where there is none."""
    for name, field in section.model_fields.items():
        value = getattr(values, name) if values is not None else field.get_default(call_default_factory=True)
        union = typing.get_origin(field.annotation) in (types.UnionType, typing.Union)
        choices = typing.get_args(field.annotation) if union else (field.annotation,)
        inner = next((choice for choice in choices if isinstance(choice, type) and issubclass(choice, BaseModel)), None)
        if inner is not None:
            yield from settings_and_defaults(inner, value if isinstance(value, BaseModel) else None, f"{prefix}{name}.")
        else:
            yield prefix + name, value if value is PydanticUndefined else TypeAdapter(Any).dump_python(value, mode="json")


def documented_defaults() -> list[tuple[str, Any]]:
    """The rows of the tables of settings; an empty cell means that there is no default."""
    found = []
    for name, heading in SETTINGS_TABLES.items():
        section = re.split(rf"^## {heading}$", (ROOT / name).read_text("utf-8"), flags=re.MULTILINE)[1].split("\n## ")[0]
        for row in re.findall(r"^\| `.*$", section, re.MULTILINE):
            cells = re.fullmatch(r"\| `([a-z_.]+)` \| (?:`([^`]*)`)? ?\| .*\|", row)
            assert cells, f"{name}: not a row of key, default and meaning: {row}"
            found.append((cells[1], PydanticUndefined if cells[2] is None else yaml.safe_load(cells[2])))
    return found


def test_the_tables_of_settings_name_every_setting_once_with_its_default() -> None:
    real, documented = dict(settings_and_defaults(Settings, Settings())), documented_defaults()
    assert sorted(key for key, _ in documented) == sorted(real)
    assert dict(documented) == real


def subcommand(words: list[str]) -> tuple[Any, list[str]]:
    """The `plora` subcommand that the words begin with, and the words after it."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        assert words and words[0] in command.commands, f"{words[:1]} is none of {sorted(command.commands)}"
        command, words = command.commands[words[0]], words[1:]
    return command, words


def module_command(module: str, words: list[str]) -> tuple[Any, list[str]] | None:
    """The command of `python -m module`; None for one that typer doesn't parse."""
    assert importlib.util.find_spec(module), f"there is no module {module}"
    if module == "plora_ray.train_all":
        return subcommand(["train-all", *words])
    program = importlib.import_module(module)
    if not hasattr(program, "typer"):
        return None
    single = typer.Typer()
    single.command()(program.main)
    return typer.main.get_command(single), words


def command_of(line: str) -> tuple[Any, list[str]] | None:
    """The program of this project that a line of shell runs, with its arguments; None if it runs none."""
    words = shlex.split(line, comments=True) if re.search(r"\bplora |\bpython -m ", line) else []
    if "--" in words:  # ray job submit ... -- python -m ...
        words = words[words.index("--") + 1 :]
    words = words[words[:1] == ["$"] :]
    if words[:1] == ["plora"]:
        return subcommand(words[1:])
    return module_command(words[2], words[3:]) if words[:2] == ["python", "-m"] and words[2] != "pytest" else None


@of_every_page
def test_every_command_line_is_accepted_and_its_overrides_are_valid_settings(page: Path, tmp_path: Path) -> None:
    empty = tmp_path / "settings.yaml"
    empty.write_text("{}")
    code = [line for block in fenced(page, "") for line in block.splitlines()]
    for line in [*block_lines(page), *(line for line in code if line.startswith("$ "))]:
        found = command_of(line)
        if found is not None:
            context = found[0].make_context("", list(found[1]))  # raises a usage error that names what is wrong
            load_settings(empty, context.params.get("overrides") or ())


@of_every_page
def test_every_command_named_in_the_text_exists_with_its_options(page: Path) -> None:
    for code in inline_code(page):
        found = command_of(code)
        if found is not None:
            command, words = found
            command.make_parser(command.context_class(command)).parse_args(list(words))


@of_every_page
def test_every_settings_file_shown_is_valid(page: Path) -> None:
    for block in fenced(page, "yaml"):
        parse_settings(yaml.safe_load(block))


@of_every_page
def test_every_setting_named_in_the_text_exists(page: Path) -> None:
    leaves = [key for key, _ in settings_and_defaults()]
    known = {key[: dot.start()] for key in leaves for dot in re.finditer(r"\.|$", key)}
    sections = "|".join(sorted(key for key in known if "." not in key))
    for code in inline_code(page):
        named = re.match(rf"(?:{sections})(?:\.[a-z_]+)+(?![\w./])", code)
        if named and not re.search(r"\.(json|md|py|yaml)$", named[0]):
            assert named[0] in known or named[0].startswith("data.filter."), f"`{code}` names no setting"


@of_every_page
def test_every_test_that_is_named_exists(page: Path) -> None:
    for code in [*inline_code(page), *block_lines(page)]:
        words = shlex.split(code) if code.startswith("pytest ") else [code] if re.fullmatch(r"tests/\S+", code) else []
        paths = [ROOT / word for word in words if word.startswith("tests/")]
        assert all(path.exists() for path in paths), code
        if "-k" in words:
            files = [file for path in paths for file in (path.rglob("test_*.py") if path.is_dir() else [path])]
            tests = [name for file in files for name in re.findall(r"^ *(?:async )?def (test_\w+)", file.read_text("utf-8"), re.MULTILINE)]
            assert any(words[words.index("-k") + 1] in name for name in tests), f"{code} selects nothing"


@of_every_page
def test_every_python_example_compiles_and_imports_what_there_is(page: Path) -> None:
    for block in fenced(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                module = importlib.import_module(node.module)
                assert all(hasattr(module, name.name) for name in node.names), ast.unparse(node)
