"""Private matrices in the engine, in few-shot fits and in exports: the same promises as for vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from plora_ray.adapters.model import pool
from plora_ray.inference import Examples, FewShotFitter, InferenceEngine, load_generation
from plora_ray.inference.export import export_user
from plora_ray.store import AdapterStore
from tests.generations import LABELS, publish

USERS = [f"person {index}" for index in range(6)]
TEXTS = ["a short text", "another text that is quite a bit longer than the first one", "x", "what do you think of this?"]


@pytest.fixture
def store(tmp_path: Path, tiny_plm: str) -> AdapterStore:
    store = AdapterStore(str(tmp_path / "store"))
    publish(store, tiny_plm, "g1", USERS, kind="lora")
    return store


def alone(store: AdapterStore, text: str, user: str | None) -> torch.Tensor:
    """Probabilities [classes] of one row alone, by the training form."""
    loaded = load_generation(store, fold=False)
    encoded = loaded.tokenizer([text], return_tensors="pt")
    adapter = None if user is None else store.pull(loaded.reader, store.key(user))
    vector = None if adapter is None else torch.from_numpy(np.array(adapter.record))[None]
    with torch.no_grad():
        return torch.softmax(loaded.model(encoded["input_ids"], encoded["attention_mask"], vector)[0], -1)


def test_mixed_batches_answer_each_user_as_alone_and_unknown_users_as_the_population(store: AdapterStore) -> None:
    engine = InferenceEngine(load_generation(store), batch_rows=7)
    rows = [((*USERS, "nobody")[place % 7], TEXTS[place % 4]) for place in range(21)]
    answers = engine.predict(rows)
    strangers = engine.predict([("nobody", text) for text in TEXTS])
    engine.close()
    asked = [*rows[:9], *(("nobody", text) for text in TEXTS)]
    for (user, text), answer in zip(asked, [*answers[:9], *strangers], strict=True):
        probabilities = torch.tensor([answer.prediction.scores[name] for name in LABELS.classes]).float()
        assert torch.allclose(probabilities, alone(store, text, None if user == "nobody" else user), atol=1e-5)
        assert answer.personalization == ("population" if user == "nobody" else "adapter")
    assert not torch.allclose(alone(store, TEXTS[0], USERS[0]), alone(store, TEXTS[0], None), atol=1e-2), "the user must matter here"


def test_a_few_shot_fit_starts_from_the_population_or_the_users_own_matrices_and_is_nobody_elses(store: AdapterStore) -> None:
    loaded = load_generation(store)
    fitter = FewShotFitter(loaded)
    start = np.array(loaded.reader.get(store.key(USERS[0])).record)  # type: ignore[union-attr]
    mine = Examples(TEXTS, ["yes", "no", "yes", "perhaps"])
    known = Examples(TEXTS[:2], ["no", "no"], start=start)
    together = fitter.fit_many([Examples(TEXTS[:3], ["no"] * 3), mine, known])
    lone = fitter.fit_many([mine])[0]
    assert lone.loss_after < lone.loss_before and np.allclose(lone.vector, together[1].vector, atol=1e-5)
    population = loaded.model.population_vector().numpy()
    assert np.linalg.norm(together[2].vector - start) < np.linalg.norm(together[2].vector - population)
    assert together[2].loss_after < together[2].loss_before


def test_an_export_is_a_plain_peft_lora_that_answers_alike(store: AdapterStore, tmp_path: Path, tiny_plm: str) -> None:
    from peft import PeftModel
    from transformers import AutoModel

    export_user(store, USERS[1], tmp_path / "out")
    loaded = load_generation(store)
    tokens = loaded.tokenizer([TEXTS[1]], return_tensors="pt")
    peft = PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_plm), str(tmp_path / "out")).eval()
    head = load_file(tmp_path / "out" / "head.safetensors")
    for model in (peft, peft.merge_and_unload()):
        with torch.inference_mode():
            hidden = model(**tokens).last_hidden_state
        logits = pool(hidden, tokens["attention_mask"], loaded.model.family.pooling) @ head["weight"].T + head["bias"]
        assert torch.allclose(torch.softmax(logits[0], -1), alone(store, TEXTS[1], USERS[1]), atol=1e-5)
