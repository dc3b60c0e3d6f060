"""The job as users run it: real Ray Train, real DeepSpeed, a real store, killed and started again."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import yaml
from safetensors.numpy import load_file

from cluster.s3_server import S3Server
from plora_ray.adapters.calibration import best_scale, scale_losses
from plora_ray.config import load_settings, parse_settings
from plora_ray.data.sources import list_units, read_unit
from plora_ray.inference import InferenceEngine, load_generation
from plora_ray.opening import open_store
from plora_ray.store import AdapterStore
from plora_ray.store.fsck import check

Tree = dict[str, Any]


def write(tree: Tree, folder: Path) -> Path:
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def start(config: Path, *overrides: str, flags: Sequence[str] = ()) -> subprocess.Popen[str]:
    """The command in a process group of its own."""
    sets = [part for override in overrides for part in ("--set", override)]
    return subprocess.Popen(
        [sys.executable, "-m", "plora_ray.train_all", "--config", str(config), *flags, *sets],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def run(config: Path, *overrides: str, flags: Sequence[str] = ()) -> tuple[int, str, str]:
    process = start(config, *overrides, flags=flags)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def train(config: Path, *overrides: str) -> dict[str, Any]:
    code, out, err = run(config, *overrides)
    assert code == 0, err
    result: dict[str, Any] = json.loads(out.splitlines()[-1])
    return result


def users_of(config: Path) -> set[str]:
    data = load_settings(config).data
    return {row for unit in list_units(data) for rows in read_unit(unit, data) for row in rows.user_ids}


def segments(store: Path) -> dict[str, tuple[bytes, int]]:
    """Finished waves by name: their bytes and when they were written."""
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in store.glob("generations/*/segments/*.safetensors")}


def test_the_job_publishes_an_adapter_for_every_user_and_its_last_line_says_so(tiny_tree: Tree, tmp_path: Path) -> None:
    tiny_tree["training"] |= {"tensorboard_dir": str(tmp_path / "board"), "guard": True, "learning_rate": 0.01, "user_learning_rate": 0.05}
    config = write(tiny_tree, tmp_path)
    result = train(config)
    assert set(result) == {"generation", "users", "examples", "store", "report", "report_html", "seconds", "active"}
    store = AdapterStore.open(tiny_tree["store"]["uri"])
    reader = store.open_generation()
    assert reader.generation == result["generation"] and result["users"] == reader.users == 60
    assert set(reader.keys()) == {store.key(user) for user in users_of(config)}
    report = json.loads(store.objects.read(f"generations/{result['generation']}/report.json"))
    left_to_the_population = [adapter for adapter in reader.get_many(reader.keys()).values() if not adapter.record.any()]
    assert report["users_guarded"] == len(left_to_the_population) < 60 and reader.manifest.adapter_config["fit"]["guard"]
    assert report["users"] == 60 and report["test"]["with_user"]["rows"] == report["rows"]["test"]
    assert report["ceilings"]["without_user"] < report["ceilings"]["with_user"]
    samples, (start,) = report["training"]["samples"], report["training"]["starts"]
    assert samples["users_done"][-1] == 60 and any(samples["loss"]) and samples["rows"][-1] >= 2 * report["rows"]["train"]
    assert start["sharding"] == "replicated" and start["parameter_bytes_held"] == [start["parameter_bytes"]] * 2
    assert sum(bucket["users"] for bucket in report["test"]["gain_by_training_rows"]) == sum(report["test"]["user_gains"]["nll"]["users"])
    html = store.objects.read(f"generations/{result['generation']}/report.html").decode()
    assert result["report_html"].endswith("/report.html") and report["verdict"] in unescape(html)
    assert html.count("data:image/png;base64,") >= 3 and "<script" not in html and "http" not in html
    assert list((tmp_path / "board" / result["generation"]).glob("events.out.tfevents.*"))
    assert not store.objects.list("runs"), "users' tokens must not outlive the run"
    everything = b"".join(path.read_bytes() for path in Path(tiny_tree["store"]["uri"]).rglob("*") if path.is_file())
    assert b"user-000" not in everything, "the store must not hold raw user ids"


def test_the_job_publishes_encrypted_to_s3_and_leaves_nothing_of_the_run_behind(
    tiny_tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("JOB_ROOT_KEY", "3e" * 32)
    with S3Server(tmp_path / "s3") as server:
        uri = server.create_bucket("plora") + "/adapters"
        tiny_tree["store"] = {"uri": uri, "endpoint_url": server.endpoint_url, "encryption": {"key_env": "JOB_ROOT_KEY"}}
        result = train(write(tiny_tree, tmp_path))
        store = open_store(parse_settings(tiny_tree).store)
        reader = store.open_generation()
        assert result["store"] == uri and reader.users == 60 == len(reader.get_many(reader.keys()))
        assert reader.manifest.encryption == "AES-256-GCM" and check(store, lambda done, total: None).data_keys == 60
        assert not store.objects.list("runs")


def kill_after_waves(config: Path, store: Path, waves: int) -> None:
    """Start the job with one worker and kill everything of it once so many waves are finished."""
    process = start(config, "training.num_workers=1")
    deadline = time.monotonic() + 200
    while len(segments(store)) < waves:
        assert process.poll() is None and time.monotonic() < deadline, "the job ended or stalled too early"
        time.sleep(0.01)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]  # Ray's have groups of their own
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.communicate()
    psutil.wait_procs(family, timeout=30)


def test_a_killed_job_started_again_trains_no_finished_wave_twice_skips_nobody_and_brings_no_erased_user_back(
    tiny_tree: Tree, tmp_path: Path
) -> None:
    tiny_tree["training"]["users_per_wave"] = 1
    config, folder = write(tiny_tree, tmp_path), Path(tiny_tree["store"]["uri"])
    kill_after_waves(config, folder, 3)
    before = segments(folder)
    store = AdapterStore.open(str(folder))
    assert store.current() is None, "an unfinished generation must not serve"
    assert len(before) < 58, "killed too late to show anything"
    keys = {store.key(user) for user in users_of(config)}
    done = {load_file(path)["keys"].tobytes() for path in folder.glob("generations/*/segments/*.safetensors")}
    erased_after_their_wave, erased_before_it = min(done), min(keys - done)
    store.erase(erased_after_their_wave)
    store.erase(erased_before_it)
    result = train(config, "training.num_workers=2")
    after = segments(folder)
    reader = store.open_generation()
    assert {name: after[name] for name in before} == before, "a finished wave was trained twice"
    assert set(reader.keys()) == keys - {erased_after_their_wave, erased_before_it}
    assert result["generation"] == store.current() and result["users"] == 59, "who was erased before his wave must not be in a segment"
    assert store.pull(reader, erased_after_their_wave) is None
    report = json.loads(store.objects.read(f"generations/{result['generation']}/report.json"))
    last = report["training"]["starts"][-1]
    assert (report["training"]["jobs"], report["training"]["restarts"], report["users"]) == (2, 1, 59)
    assert last["resumed"] and len(last["parameter_bytes_held"]) == 2


def test_the_gain_is_there_with_the_true_users_and_vanishes_with_shuffled_ones(tiny_tree: Tree, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    rows = [(user, f"text {generator.integers(10_000)}", ["no", "yes"][user % 2]) for user in range(40) for _ in range(16)]
    gains = {}
    for name, users in (("true", [row[0] for row in rows]), ("shuffled", generator.permutation([row[0] for row in rows]).tolist())):
        lines = [
            json.dumps({"user_id": f"u{user}", "text": text, "label": label}) for user, (_, text, label) in zip(users, rows, strict=True)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        tree = {**tiny_tree, "data": {"source": str(tmp_path / f"{name}.jsonl")}, "store": {"uri": str(tmp_path / name)}}
        tree["training"] = {**tiny_tree["training"], "epochs": 3, "user_learning_rate": 0.05}
        result = train(write(tree, tmp_path))
        store = AdapterStore.open(tree["store"]["uri"])
        gains[name] = json.loads(store.objects.read(f"generations/{result['generation']}/report.json"))["test"]["nll_gain"]
    assert gains["true"]["low"] > 0.1
    assert gains["shuffled"]["high"] < 0.05


def test_sharded_and_replicated_training_give_the_same_model(tiny_tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLORA_STORE_KEY", "one key, so that both stores know users by the same hash")
    tiny_tree["training"].update({"epochs": 2, "user_dropout": 0.0, "users_per_wave": 60})
    shared, vectors = {}, {}
    for sharding in ("zero3", "replicated"):
        tree = {**tiny_tree, "store": {"uri": str(tmp_path / sharding)}}
        config = write(tree, tmp_path)
        code, out, err = run(config, f"training.sharding={sharding}")
        assert code == 0, err
        assert f"2 ranks, {sharding}" in err
        report = json.loads(next((tmp_path / sharding).glob("generations/*/report.json")).read_text())
        assert report["training"]["restarts"] == 0
        reader = AdapterStore.open(tree["store"]["uri"]).open_generation()
        shared[sharding] = reader.shared().tensors
        vectors[sharding] = {key: adapter.record for key, adapter in reader.get_many(list(reader.keys())).items()}
    for name, tensor in shared["zero3"].items():
        if not name.startswith("prior."):
            assert torch.allclose(tensor, shared["replicated"][name], atol=1e-4), name
    assert vectors["zero3"].keys() == vectors["replicated"].keys() and len(vectors["zero3"]) == 60
    for key, vector in vectors["zero3"].items():
        assert np.allclose(vector, vectors["replicated"][key], atol=1e-2)


def test_a_job_runs_with_adapters_on_top_shards_offloaded_blocks_recomputed_and_a_profile(tiny_tree: Tree, tmp_path: Path) -> None:
    tiny_tree["adapter"] = {**tiny_tree.get("adapter", {}), "top_layers": 1}
    profile = Path(__file__).parents[2] / "cluster" / "deepspeed" / "zero3-offload-cpu.json"
    config = write(tiny_tree, tmp_path)
    sets = ("training.offload=cpu", "training.gradient_checkpointing=true", f"training.deepspeed_profile={profile}")
    code, out, err = run(config, *sets)
    assert code == 0, err
    assert ", zero3: " in err
    store = AdapterStore.open(tiny_tree["store"]["uri"])
    shared = store.open_generation().shared().tensors
    adapted = {name.split(".layer.")[1].split(".")[0] for name in shared if name.startswith("layers.")}
    assert adapted == {"1"}, "only the upper of the two blocks may have adapters"
    assert store.open_generation().users == json.loads(out.splitlines()[-1])["users"] == 60


def test_the_published_adapters_answer_as_the_report_says_and_are_as_sure_as_validation_rows_allow(tiny_tree: Tree, tmp_path: Path) -> None:
    # Without leanings, whose mean is found after the scale and moves the population a little away from where that was chosen.
    config = write({**tiny_tree, "adapter": {**tiny_tree["adapter"], "head_terms": "none"}}, tmp_path)
    result = train(config)
    store = AdapterStore.open(tiny_tree["store"]["uri"])
    report = json.loads(store.objects.read(f"generations/{result['generation']}/report.json"))
    engine = InferenceEngine(load_generation(store))
    assert engine.loaded.prior is not None and report["lasting"] == round(engine.loaded.prior.lasting, 4) and report["forgetting"] is None
    data = load_settings(config).data
    rows = [
        (split, user, text, label)
        for unit in list_units(data)
        for chunk in read_unit(unit, data)
        for user, text, label, split in zip(chunk.user_ids, chunk.texts, chunk.labels, chunk.splits, strict=True)
    ]
    tests = [row for row in rows if row[0] == "test"]
    answers = engine.predict([(user, text) for _, user, text, _ in tests])
    nll = -np.mean([np.log(answer.prediction.scores[label]) for answer, (*_, label) in zip(answers, tests, strict=True)])
    assert {answer.personalization for answer in answers} == {"adapter"}
    assert nll == pytest.approx(report["test"]["with_user"]["nll"], abs=2e-4)
    scale, held_out = report["calibration"]["logit_scale"], [row for row in rows if row[0] == "validation"]
    served = engine.score(engine.encode([text for _, _, text, _ in held_out]), [None] * len(held_out))
    engine.close()
    names = engine.loaded.labels.classes
    learnt = [row[-1] for row in rows if row[0] == "train"]
    base = np.log([(learnt.count(name) + 1) / (len(learnt) + len(names)) for name in names])
    as_trained = torch.from_numpy(base + (served.numpy() - base) / scale)
    labels = engine.loaded.labels.encode([label for *_, label in held_out])
    assert scale != 1 and best_scale(scale_losses(as_trained, labels, base.tolist())) == pytest.approx(scale, rel=0.05)


@pytest.mark.parametrize(
    ("override", "code", "message"),
    [
        ("training.epoch=3", 2, "unknown setting 'training.epoch': did you mean 'training.epochs'"),
        ("model.name=no-such-model", 1, "cannot load"),
        ("data.source=nowhere.parquet", 1, "nowhere.parquet"),
        ("store.uri=/proc/store", 1, "/proc/store"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line_before_anything_is_trained(
    tiny_tree: Tree, tmp_path: Path, override: str, code: int, message: str
) -> None:
    found, out, err = run(write(tiny_tree, tmp_path), override)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert found == code and not out and len(errors) == 1 and message in errors[0]
    assert not Path(tiny_tree["store"]["uri"], "generations").exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("user_id,text,label\n", "no usable row"),
        ("user_id,text,label,split\nu1,a,x,train\nu1,b,y,train\nu1,c,z,test\n", "only the test split has"),
        ("user_id,text,label\nu1,,x\n", "text"),
    ],
)
def test_data_that_cannot_be_learned_from_is_refused_with_the_reason(tiny_tree: Tree, tmp_path: Path, rows: str, message: str) -> None:
    (tmp_path / "rows.csv").write_text(rows)
    code, out, err = run(write(tiny_tree, tmp_path), f"data.source={tmp_path / 'rows.csv'}")
    assert code == 1 and not out and message in err
    assert AdapterStore.open(tiny_tree["store"]["uri"]).current() is None


def test_a_regression_learns_numbers(tiny_tree: Tree, tmp_path: Path) -> None:
    lines = [json.dumps({"user_id": f"u{row % 7}", "text": f"text number {row}", "label": 100 + row % 7}) for row in range(140)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    tiny_tree.update({"task": "regression", "data": {"source": str(tmp_path / "rows.jsonl")}})
    result = train(write(tiny_tree, tmp_path))
    store = AdapterStore.open(tiny_tree["store"]["uri"])
    report = json.loads(store.objects.read(f"generations/{result['generation']}/report.json"))
    assert 100 <= report["labels"]["mean"] <= 106
    assert report["test"]["with_user"]["mse"] < report["test"]["without_user"]["mse"]
