"""The whole job with private matrices: the same partitions, waves and store as with vectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from plora_ray.inference import Examples, FewShotFitter, InferenceEngine, load_generation
from plora_ray.store import AdapterStore
from tests.training.test_job import run, train, write

Tree = dict[str, Any]


@pytest.fixture
def lora_tree(tiny_tree: Tree) -> Tree:
    tiny_tree["adapter"] = {"kind": "lora", "rank": 2, "alpha": 4.0}
    tiny_tree["training"] |= {"adam": {"epochs": 4, "learning_rate": 0.01, "pull": 1.0}}
    return tiny_tree


def test_a_job_of_private_matrices_is_published_served_fitted_further_and_gains(lora_tree: Tree, tmp_path: Path) -> None:
    rows = [(f"u{user}", f"text {row * 7919 % 1000}", ["no", "yes"][user % 2]) for user in range(24) for row in range(14)]
    lines = [json.dumps({"user_id": user, "text": text, "label": label}) for user, text, label in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    lora_tree["data"] = {"source": str(tmp_path / "rows.jsonl")}
    result = train(write(lora_tree, tmp_path))
    store = AdapterStore.open(lora_tree["store"]["uri"])
    report = json.loads(store.objects.read(f"generations/{result['generation']}/report.json"))
    assert result["users"] == 24 and report["test"]["nll_gain"]["low"] > 0
    loaded = load_generation(store)
    assert loaded.reader.manifest.kind == "lora" and not any(name.startswith("prior.") for name in loaded.reader.shared().tensors)
    record = np.array(loaded.reader.get(store.key("u0")).record)  # type: ignore[union-attr]
    assert record.shape == loaded.model.population_vector().shape
    engine = InferenceEngine(loaded)
    yes, no, nobody = engine.predict([("u1", "text 5"), ("u0", "text 5"), ("stranger", "text 5")])
    engine.close()
    assert yes.prediction.scores["yes"] > nobody.prediction.scores["yes"] > no.prediction.scores["yes"]
    fit = FewShotFitter(load_generation(store)).fit_many([Examples(["text 1", "text 2"], ["yes", "yes"])])[0]
    assert fit.loss_after < fit.loss_before


def test_sharded_and_replicated_training_give_the_same_matrices(lora_tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLORA_STORE_KEY", "one key, so that both stores know users by the same hash")
    lora_tree["data"]["source"] = "synthetic://?users=21&texts=8&pool=60"  # ranks with unequal users, rows and epochs
    lora_tree["training"] |= {"users_per_wave": 4, "partitions": 3, "adam": {"epochs": 3, "rows_per_step": 4, "patience": 1}}
    records, shared = {}, {}
    for sharding in ("zero3", "replicated"):
        tree = {**lora_tree, "store": {"uri": str(tmp_path / sharding)}}
        code, _, err = run(write(tree, tmp_path), f"training.sharding={sharding}")
        assert code == 0 and f"2 ranks, {sharding}" in err, err
        reader = AdapterStore.open(tree["store"]["uri"]).open_generation()
        shared[sharding] = reader.shared().tensors
        records[sharding] = {key: adapter.record for key, adapter in reader.get_many(list(reader.keys())).items()}
    for name, tensor in shared["zero3"].items():
        assert torch.allclose(tensor, shared["replicated"][name], atol=1e-4), name
    assert records["zero3"].keys() == records["replicated"].keys() and len(records["zero3"]) == 21
    for key, record in records["zero3"].items():
        assert np.allclose(record, records["replicated"][key], atol=2e-3)
