"""The `plora` command over a real store."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from plora_ray.cli import app
from plora_ray.store import AdapterStore
from plora_ray.store.retained import RetainedExamples
from tests.generations import publish

Tree = dict[str, Any]


@pytest.fixture
def world(tiny_tree: Tree, tmp_path: Path) -> tuple[AdapterStore, str]:
    store = AdapterStore(tiny_tree["store"]["uri"])
    publish(store, tiny_tree["model"]["name"], "g1", ["ann", "bob"])
    publish(store, tiny_tree["model"]["name"], "g2", ["ann", "bob", "cy"])
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(tiny_tree))
    return store, str(path)


def plora(config: str, *arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [*arguments, "--config", config])
    return result.exit_code, result.stdout, result.stderr


def test_the_version_is_the_packages() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0 and result.stdout == f"plora-ray {metadata.version('plora-ray')}\n"


def test_generations_are_listed_shown_and_activated(world: tuple[AdapterStore, str]) -> None:
    store, config = world
    code, out, _ = plora(config, "generations", "list")
    assert code == 0 and [line.split()[-0 if line[0] == "*" else 0] for line in out.splitlines()][0] == "g1"
    assert out.splitlines()[1].startswith("* g2")
    assert json.loads(plora(config, "generations", "show", "g1")[1])["users"] == 2
    assert plora(config, "generations", "activate", "g1")[0] == 0 and store.current() == "g1"
    code, _, err = plora(config, "generations", "activate", "g9")
    assert code == 1 and err.startswith("error: ") and "g1, g2" in err and err.count("\n") == 1


def test_users_are_listed_by_hash_shown_and_erased(world: tuple[AdapterStore, str]) -> None:
    store, config = world
    listed = plora(config, "users", "list")[1].split()
    assert sorted(listed) == sorted(store.key(name).hex() for name in ("ann", "bob", "cy"))
    shown = json.loads(plora(config, "users", "show", "ann")[1])
    assert shown["adapter"]["source"] == "generation" and shown["erased"] is False
    assert plora(config, "users", "erase", "ann")[0] == 0
    shown = json.loads(plora(config, "users", "show", "ann")[1])
    assert shown["adapter"] is None and shown["erased"] is True
    assert len(plora(config, "users", "list")[1].split()) == 2
    store.activate("g1")
    assert json.loads(plora(config, "users", "show", "ann")[1])["adapter"] is None, "a rollback must not bring an erased user back"


def test_a_user_is_exported_as_a_directory_and_an_unknown_one_is_not(world: tuple[AdapterStore, str], tmp_path: Path) -> None:
    _, config = world
    code, out, err = plora(config, "users", "export", "bob", "--out", str(tmp_path / "bob"))
    assert code == 0, err
    assert (Path(out.strip()) / "adapter_model.safetensors").exists()
    code, _, err = plora(config, "users", "export", "nobody", "--out", str(tmp_path / "nobody"))
    assert code == 1 and err.startswith("error: ") and not (tmp_path / "nobody").exists()


def test_users_of_retained_examples_are_fitted_again_and_only_if_examples_are_retained(world: tuple[AdapterStore, str]) -> None:
    store, config = world
    RetainedExamples(store.objects, 30).keep(store.key("dora"), ["a text"], ["yes"])
    code, _, err = plora(config, "users", "refit")
    assert code == 2 and "store.retention.examples_days is off" in err
    kept = ("--set", "store.retention.examples_days=30", "--set", "store.retention.allow_plain=true")
    code, out, err = plora(config, "users", "refit", *kept)
    assert code == 0 and json.loads(out) == {"fitted": 1, "standing": 0, "refused": 0}, err
    assert store.get_fresh(store.key("dora")) is not None
    code, _, err = plora(config, "users", "refit", "--set", "store.retention.examples_days=30")
    assert code == 2 and "retention.allow_plain to true" in err


def test_an_exported_user_is_imported_for_another_one(world: tuple[AdapterStore, str], tmp_path: Path) -> None:
    store, config = world
    plora(config, "users", "export", "bob", "--out", str(tmp_path / "bob"))
    code, out, err = plora(config, "users", "import", str(tmp_path / "bob"), "--user", "dora")
    fresh = store.get_fresh(store.key("dora"))
    assert code == 0 and fresh is not None and json.loads(out)["version"] == fresh.version, err
    code, _, err = plora(config, "users", "import", str(tmp_path), "--user", "dora")
    assert code == 1 and err.startswith("error: ") and "adapter_config.json can't be read" in err


def test_gc_deletes_old_and_unfinished_generations_and_keeps_the_current_one(world: tuple[AdapterStore, str], tiny_tree: Tree) -> None:
    store, config = world
    publish(store, tiny_tree["model"]["name"], "g3", ["ann"])
    store.begin("g4-unfinished")
    store.activate("g1")
    assert plora(config, "generations", "gc", "--keep", "1")[1] == "", "everything is younger than the default grace time"
    code, out, _ = plora(config, "generations", "gc", "--keep", "1", "--grace-hours", "0", "--dry-run")
    assert code == 0 and "would delete g2 (published" in out and "would delete g4-unfinished (unfinished" in out
    assert len(store.generations()) == 3
    plora(config, "generations", "gc", "--keep", "1", "--grace-hours", "0")
    assert [info.generation for info in store.generations()] == ["g1", "g3"] and store.current() == "g1"
    assert {item.path.split("/")[1] for item in store.objects.list("generations")} == {"g1", "g3"}
    assert store.open_generation().users == 2
    assert plora(config, "generations", "gc", "--keep", "0")[0] == 1


def test_bad_usage_and_bad_configuration_exit_with_2(world: tuple[AdapterStore, str], tmp_path: Path) -> None:
    _, config = world
    assert plora(config, "generations", "list", "--nonsense")[0] == 2
    code, _, err = plora(config, "generations", "list", "--set", "stor.uri=x")
    assert code == 2 and err == "error: unknown setting 'stor': did you mean 'store'?\n"
    assert plora(str(tmp_path / "none.yaml"), "users", "list")[0] == 2
    assert plora(config, "users", "list", "--set", f"store.uri={tmp_path / 'nothing'}")[0] == 1


def test_a_plain_store_is_copied_into_an_encrypted_one_whose_root_key_is_then_changed(
    world: tuple[AdapterStore, str], tmp_path: Path
) -> None:
    _, config = world
    old, new = tmp_path / "root.key", tmp_path / "next.key"
    old.write_text("1d" * 32)
    new.write_text("2e" * 32)
    to = str(tmp_path / "encrypted")
    assert plora(config, "generations", "copy", "g2", "--to", to, "--key-file", str(old))[0] == 0
    there = ["--set", f"store.uri={to}"]
    with_old, with_new = [*there, "--set", f"store.encryption.key_file={old}"], [*there, "--set", f"store.encryption.key_file={new}"]
    assert plora(config, "generations", "activate", "g2", *with_old)[0] == 0
    assert plora(config, "store", "rotate-key", *with_old)[0] == 2, "without a new key there is nothing to do"
    code, out, err = plora(config, "store", "rotate-key", "--key-file", str(new), "--rewrap", *with_old)
    assert (code, out) == (0, "new data keys are wrapped by version 2 of the ring\n"), err
    for settings, message in ((with_old, "under another root key"), (there, "is encrypted: set store.encryption")):
        code, _, err = plora(config, "users", "show", "ann", *settings)
        assert code == 1 and message in err and err.count("\n") == 1
    shown = json.loads(plora(config, "users", "show", "ann", *with_new)[1])
    assert shown["adapter"]["source"] == "generation" and shown["traces"]["data_key"] is True
    assert plora(config, "users", "erase", "ann", *with_new)[0] == 0
    assert json.loads(plora(config, "users", "show", "ann", *with_new)[1])["traces"]["data_key"] is False
    for settings in (with_new, there):
        code, out, err = plora(config, "store", "fsck", *settings)
        assert code == 0 and json.loads(out)["data_keys"] == 2, err
    assert json.loads(plora(config, "users", "show", "ann")[1])["traces"]["data_key"] is None, "the plain store is as it was"
