"""Several generations as users run them: only users with new data, dry runs, a killed job, a warm start. Real Ray, real DeepSpeed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from plora_ray.inference import InferenceEngine, load_generation
from plora_ray.store import AdapterStore, UserAdapter, new_version
from tests.training.test_job import kill_after_waves, run, segments, train

Tree = dict[str, Any]
USERS, TEXTS = 20, 8


def rows_of(user: str, texts: int) -> list[Tree]:
    splits = ["test", "validation"] + ["train"] * (texts - 2)
    return [
        {"user_id": user, "text": f"film {user} number {place}", "label": ["no", "yes"][(len(user) + place) % 2], "split": split}
        for place, split in enumerate(splits)
    ]


def write_rows(path: Path, users: dict[str, int]) -> None:
    path.write_text("\n".join(json.dumps(row) for user, texts in users.items() for row in rows_of(user, texts)))


@pytest.fixture(scope="module")
def trained(tiny_plm: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tree, Path]:
    """Settings and the folder of a store with one generation of 20 users."""
    folder = tmp_path_factory.mktemp("base")
    write_rows(folder / "rows.jsonl", {f"u{user}": TEXTS for user in range(USERS)})
    tree = {
        "model": {"name": tiny_plm, "max_length": 32},
        "adapter": {"rank": 4, "alpha": 8.0, "user_dim": 8},
        "data": {"source": str(folder / "rows.jsonl")},
        "training": {"epochs": 1, "partitions": 4, "users_per_wave": 3, "num_workers": 2},
        "store": {"uri": str(folder / "store")},
    }
    (folder / "settings.yaml").write_text(yaml.safe_dump(tree))
    train(folder / "settings.yaml")
    return tree, folder / "store"


@pytest.fixture
def world(trained: tuple[Tree, Path], tmp_path: Path) -> tuple[AdapterStore, Callable[..., Path]]:
    """A copy of that store, and what writes settings with other rows for it."""
    tree, folder = trained
    shutil.copytree(folder, tmp_path / "store")

    def settings(users: dict[str, int], **training: Any) -> Path:
        write_rows(tmp_path / "rows.jsonl", users)
        changed = {"data": {"source": str(tmp_path / "rows.jsonl")}, "store": {"uri": str(tmp_path / "store")}}
        path = tmp_path / "settings.yaml"
        path.write_text(yaml.safe_dump({**tree, **changed, "training": {**tree["training"], **training}}))
        return path

    return AdapterStore.open(str(tmp_path / "store")), settings


def records_of(store: AdapterStore, generation: str) -> dict[bytes, tuple[bytes, int]]:
    reader = store.open_generation(generation)
    return {key: (adapter.record.tobytes(), adapter.examples) for key, adapter in reader.get_many(reader.keys()).items()}


def fresh(store: AdapterStore, user: str, value: float) -> UserAdapter:
    reader = store.open_generation()
    record = np.full(reader.manifest.width, value, np.float32)
    return UserAdapter(store.key(user), record, 5, reader.generation, new_version(), "2026-01-31T00:00:00", "fresh", reader.basis)


def test_only_users_with_new_rows_change_and_the_dry_run_says_so_before(
    world: tuple[AdapterStore, Callable[..., Path]],
) -> None:
    store, settings = world
    base = store.open_generation()
    before = records_of(store, base.generation)
    adapted, newcomer = fresh(store, "u5", 0.25), fresh(store, "only fresh", 0.5)
    store.put_fresh(adapted)
    store.put_fresh(newcomer)
    store.put_fresh(replace(fresh(store, "elsewhere", 0.5), basis="0" * 64))
    store.erase(store.key("u7"))
    now = {f"u{user}": TEXTS for user in range(USERS - 1)} | {"u0": TEXTS + 1, "u1": TEXTS + 4, "brand new": 6}
    config = settings(now)

    objects = {item.path: item.tag for item in store.objects.list()}
    code, out, err = run(config, "training.only_users_with_new_data=true", flags=["--dry-run"])
    assert code == 0, err
    said = json.loads(out.splitlines()[-1])
    assert said["dry_run"] is True and "carry over 16 users, refit 3 (1 new)" in err and "take in 2 fresh adapters" in err
    written = {item.path for item in store.objects.list()} - objects.keys()
    assert all(path.startswith("runs/") and ("/partitions/" in path or path.endswith("/run.json")) for path in written) and written
    assert {item.path: item.tag for item in store.objects.list() if item.path not in written} == objects

    code, out, err = run(config, flags=["--only-users-with-new-data"])
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert "tokenise rows" not in err, "the dry run has partitioned the rows already"
    after, reader = records_of(store, result["generation"]), store.open_generation()
    assert reader.generation == result["generation"] and result["active"] and reader.basis == base.basis
    assert store.objects.read(reader.manifest.shared.path) == store.objects.read(base.manifest.shared.path)
    changed = {key for key in before.keys() & after.keys() if before[key] != after[key]}
    assert changed == {store.key(user) for user in ("u0", "u1", "u5")}
    assert after.keys() - before.keys() == {store.key("brand new"), newcomer.key} and before.keys() - after.keys() == {store.key("u7")}
    assert store.key("u7") not in after and store.key("u19") in after
    assert after[store.key("u0")][1] == TEXTS - 1 and after[store.key("brand new")][1] == 4
    assert after[adapted.key] == (adapted.record.tobytes(), 5) and after[newcomer.key] == (newcomer.record.tobytes(), 5)
    report = json.loads(store.objects.read(f"generations/{result['generation']}/report.json"))
    assert report["plan"] == {name: said[name] for name in report["plan"]}
    assert said["users"] == result["users"] == len(after) == 21 and said["waves"] == len(reader.manifest.segments)
    assert max(segment.users for segment in reader.manifest.segments) == said["largest_users"]
    assert not store.objects.list("runs"), "users' tokens must not outlive the run"
    engine = InferenceEngine(load_generation(store))
    answers = engine.predict([("brand new", "film"), ("u19", "film"), ("nobody", "film")])
    engine.close()
    assert [answer.personalization for answer in answers] == ["adapter", "adapter", "population"]

    code, out, err = run(config, flags=["--only-users-with-new-data"])
    assert code == 0 and "no user has new data" in err
    again = json.loads(out.splitlines()[-1])
    assert (again["generation"], again["users"]) == (result["generation"], 21)
    assert len(store.generations()) == 2 and not store.objects.list("runs")


def test_a_killed_job_goes_on_and_an_adapter_stored_meanwhile_wins(
    world: tuple[AdapterStore, Callable[..., Path]],
) -> None:
    store, settings = world
    folder = Path(store.uri.removeprefix("file://"))
    base = store.open_generation()
    before, standing = records_of(store, base.generation), len(segments(folder))
    config = settings({f"u{user}": TEXTS + user % 2 for user in range(USERS)}, users_per_wave=1, only_users_with_new_data=True)
    kill_after_waves(config, folder, standing + 3)
    finished = segments(folder)
    assert standing < len(finished) < standing + USERS, "killed too late to show anything"
    late = fresh(store, "u0", 0.75)
    store.put_fresh(late)
    code, out, err = run(config, "training.num_workers=2")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert {name: segments(folder)[name] for name in finished} == finished, "a finished wave was written twice"
    after = records_of(store, result["generation"])
    assert {key for key in before if before[key] != after[key]} == {store.key(f"u{user}") for user in range(1, USERS, 2)}
    assert len(store.open_generation(result["generation"]).manifest.segments) == USERS and result["active"]
    served = store.pull(store.open_generation(), late.key)
    assert served is not None and served.record.tobytes() == late.record.tobytes(), "what was stored while the job ran must win"


def test_a_warm_start_begins_at_the_shared_parameters_of_the_current_generation(
    world: tuple[AdapterStore, Callable[..., Path]],
) -> None:
    store, settings = world
    base = store.open_generation()
    before = base.shared().tensors
    still = {"learning_rate": 1e-12, "user_learning_rate": 1e-12, "weight_decay": 0.0, "calibrate": False}
    result = train(settings({f"u{user}": TEXTS for user in range(USERS)}, warm_start=True, **still))
    reader = store.open_generation()
    after = reader.shared().tensors
    assert result["generation"] == reader.generation != base.generation and result["users"] == USERS
    heard = {name: {"q": "P", "bias": "H"}.get(name.rpartition(".")[2]) for name in before if not name.startswith("prior.")}
    for name in (name for name, by in heard.items() if by is None):
        assert torch.allclose(after[name], before[name], atol=1e-6), name
    # Vectors are counted from their mean anew: one vector, added for everybody, must explain all that moved.
    moved = torch.cat([after[name] - before[name] for name, by in heard.items() if by])
    effect = torch.cat([before[f"{name.rpartition('.')[0]}.{by}"] for name, by in heard.items() if by])
    assert torch.allclose(effect @ torch.linalg.lstsq(effect, moved[:, None], driver="gelsd").solution, moved[:, None], atol=1e-5)
    code, out, err = run(settings({"a": TEXTS, "b": TEXTS}, warm_start=True), "adapter.rank=2")
    assert code == 1 and not out and "another rank (4 then, 2 now): set it back or train a new population" in err
