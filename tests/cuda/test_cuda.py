"""What must hold on a GPU as it does on a CPU; without a GPU there is nothing to run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from plora_ray.adapters.inject import Kind
from plora_ray.data.synthetic import SyntheticParams, rows_of_user
from plora_ray.inference import Examples, FewShotFitter, InferenceEngine, LoadedGeneration, load_generation
from plora_ray.store import AdapterStore
from tests.generations import publish
from tests.training.test_job import run, write

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")

USERS = [f"person {index}" for index in range(20)]
TEXTS = ["a short text", "another text that is quite a bit longer than the first one", "x", "what do you think of this?"]
ROWS = [(USERS[place % 20] if place % 5 else "nobody", TEXTS[place % 4]) for place in range(64)]


@pytest.fixture(params=["plora", "lora"])
def store(request: pytest.FixtureRequest, tmp_path: Path, tiny_plm: str) -> AdapterStore:
    store, kind = AdapterStore(str(tmp_path / "made")), request.param
    publish(store, tiny_plm, "g1", USERS, kind=kind)
    return store


@pytest.fixture(params=["replicated", "zero3"])
def trained(request: pytest.FixtureRequest, tiny_tree: dict[str, Any], tmp_path: Path) -> tuple[AdapterStore, str]:
    """A generation that the job trained on the GPU, and what the job said."""
    more = {"num_workers": 1, "use_gpu": True, "sharding": request.param, "learning_rate": 0.01, "user_learning_rate": 0.05, "epochs": 3}
    tiny_tree["training"] |= more
    code, _, told = run(write(tiny_tree, tmp_path))
    assert code == 0, told
    return AdapterStore.open(tiny_tree["store"]["uri"]), told


def scores(loaded: LoadedGeneration, rows: list[tuple[str, str]]) -> torch.Tensor:
    """Probabilities [rows, classes] of the engine."""
    engine = InferenceEngine(loaded)
    found = [list(answer.prediction.scores.values()) for answer in engine.predict(rows)]
    engine.close()
    return torch.tensor(found)


def test_the_job_trains_on_the_gpu_and_a_cpu_gives_its_users_the_same_answers(trained: tuple[AdapterStore, str]) -> None:
    store, told = trained
    assert "starting 1 GPU workers" in told
    report = json.loads(store.objects.read(f"generations/{store.open_generation().generation}/report.json"))
    assert report["test"]["with_user"]["nll"] < report["test"]["without_user"]["nll"]
    params = SyntheticParams.from_url("synthetic://?users=60&texts=10&pool=80")
    rows = [(row.user_id, row.text) for user in range(60) for row in rows_of_user(params, user)]
    on_gpu, on_cpu = (scores(load_generation(store, device=device), rows) for device in ("cuda", "cpu"))
    assert torch.allclose(on_gpu, on_cpu, atol=1e-4)


def test_a_mixed_batch_on_the_gpu_answers_every_row_as_the_cpu_does_alone(store: AdapterStore) -> None:
    mixed = scores(load_generation(store, device="cuda"), ROWS)
    one_by_one = torch.cat([scores(load_generation(store), [row]) for row in ROWS[:10]])
    assert torch.allclose(mixed[:10], one_by_one, atol=1e-4)
    in_bfloat16 = scores(load_generation(store, device="cuda", dtype=torch.bfloat16), ROWS)
    assert float((in_bfloat16 - mixed).abs().max()) < 0.1 and float((in_bfloat16 - mixed).abs().mean()) < 0.02


def test_examples_make_the_same_user_on_a_gpu_as_on_a_cpu(store: AdapterStore) -> None:
    asked = [Examples(TEXTS, ["yes", "no", "yes", "perhaps"]), Examples(TEXTS[:1], ["no"])]
    on_gpu, on_cpu = (FewShotFitter(load_generation(store, device=device)).fit_many(asked) for device in ("cuda", "cpu"))
    for gpu, cpu in zip(on_gpu, on_cpu, strict=True):
        assert torch.allclose(torch.from_numpy(gpu.vector), torch.from_numpy(cpu.vector), atol=1e-3)
        assert gpu.loss_after == pytest.approx(cpu.loss_after, abs=1e-3) and gpu.loss_after < gpu.loss_before


@pytest.mark.parametrize("kind", ["plora", "lora"])
def test_a_compiled_engine_answers_as_one_that_is_not(kind: Kind, tmp_path: Path, tiny_plm: str) -> None:
    store = AdapterStore(str(tmp_path / "store"))
    publish(store, tiny_plm, "g1", USERS, kind=kind)
    loaded = load_generation(store, device="cuda")
    engine = InferenceEngine(loaded, compiled=True)
    found = torch.tensor([list(answer.prediction.scores.values()) for answer in engine.predict(ROWS)])
    engine.close()
    assert torch.allclose(found, scores(loaded, ROWS), atol=1e-4)
