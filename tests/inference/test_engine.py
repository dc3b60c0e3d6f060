"""The engine: each row its own user's answer, one generation an answer, adapters as the store has them."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from plora_ray.errors import CorruptObjectError, ModelError, StoreError
from plora_ray.inference import InferenceEngine, load_generation
from plora_ray.inference.batcher import EngineClosed
from plora_ray.inference.cache import AdapterCache
from plora_ray.store import AdapterStore, UserAdapter, new_version
from plora_ray.store.adapters import now_iso
from tests.generations import DIM, LABELS, publish
from tests.inference.conftest import TEXTS, USERS


def expected(store: AdapterStore, text: str, vector: np.ndarray | None) -> torch.Tensor:
    """Probabilities [classes] of one row alone in the training form."""
    loaded = load_generation(store, fold=False)
    encoded = loaded.tokenizer([text], return_tensors="pt")
    with torch.no_grad():
        users = None if vector is None else torch.from_numpy(vector)[None]
        return torch.softmax(loaded.model(encoded["input_ids"], encoded["attention_mask"], users)[0], -1)


def fresh(engine: InferenceEngine, user: str, vector: np.ndarray, version: str | None = None) -> UserAdapter:
    loaded = engine.loaded
    return UserAdapter(
        key=loaded.store.key(user), record=vector.astype(np.float32), examples=3, generation=loaded.name, version=version or new_version(),
        updated_at=now_iso(), source="fresh", basis=loaded.reader.basis,
    )  # fmt: skip


def test_a_mixed_batch_answers_every_row_as_its_user_alone_in_the_training_form(store: AdapterStore, tiny_plm: str) -> None:
    vectors = publish(store, tiny_plm, "g1", USERS)
    engine = InferenceEngine(load_generation(store), batch_rows=7)
    rows = [(USERS[place % 20], TEXTS[place % 4]) for place in range(33)]
    answers = engine.predict(rows)
    engine.close()
    for place in (0, 1, 2, 3, 19, 32):
        user, text = rows[place]
        probabilities = torch.tensor([answers[place].prediction.scores[name] for name in LABELS.classes])
        assert torch.allclose(probabilities.float(), expected(store, text, vectors[user]), atol=1e-5)
        assert answers[place].personalization == "adapter"


def test_an_unknown_user_gets_exactly_the_population_answer_and_the_answer_says_so(engine: InferenceEngine, store: AdapterStore) -> None:
    known, unknown = engine.predict([(USERS[0], TEXTS[0]), ("nobody", TEXTS[0])])
    assert (known.personalization, unknown.personalization) == ("adapter", "population")
    probabilities = torch.tensor([unknown.prediction.scores[name] for name in LABELS.classes])
    assert torch.allclose(probabilities.float(), expected(store, TEXTS[0], None), atol=1e-5)
    assert unknown.reason is None


def test_a_user_whom_the_guard_left_to_the_population_gets_exactly_its_answer_and_the_answer_says_so(engine: InferenceEngine) -> None:
    engine.admit(fresh(engine, USERS[0], np.zeros(DIM)))
    guarded, unknown, other = engine.predict([(USERS[0], TEXTS[0]), ("nobody", TEXTS[0]), (USERS[1], TEXTS[0])])
    assert (guarded.personalization, guarded.reason) == ("population", "guarded") and other.personalization == "adapter"
    assert guarded.prediction == unknown.prediction and guarded.generation == unknown.generation


def test_a_version_token_makes_the_engine_see_an_adapter_that_was_stored_elsewhere(engine: InferenceEngine, store: AdapterStore) -> None:
    before = engine.predict([(USERS[0], TEXTS[0])])[0]
    adapter = fresh(engine, USERS[0], np.full(DIM, 3.0))
    store.put_fresh(adapter)
    assert engine.predict([(USERS[0], TEXTS[0])])[0] == before, "without the token the cached adapter may still answer"
    after = engine.predict([(USERS[0], TEXTS[0])], at_least=adapter.version)[0]
    assert after.prediction.scores != before.prediction.scores


def test_an_erased_users_adapter_leaves_the_cache_and_the_store_refuses_it_afterwards(engine: InferenceEngine, store: AdapterStore) -> None:
    assert engine.predict([(USERS[0], TEXTS[0])])[0].personalization == "adapter"
    store.erase(store.key(USERS[0]))
    store.tombstones()  # the readers of a store share what it knows
    engine.cache.evict([store.key(USERS[0])])
    assert engine.predict([(USERS[0], TEXTS[0])])[0].personalization == "population"


def test_an_adapter_of_other_shared_parameters_is_never_admitted(engine: InferenceEngine) -> None:
    adapter = fresh(engine, "somebody", np.ones(DIM))
    other = UserAdapter(**{**{name: getattr(adapter, name) for name in adapter.__dataclass_fields__}, "basis": "0" * 64})
    engine.admit(other)
    assert engine.predict([("somebody", TEXTS[0])])[0].personalization == "population"
    engine.admit(adapter)
    assert engine.predict([("somebody", TEXTS[0])])[0].personalization == "adapter"


def test_a_generation_of_another_plms_weights_is_refused(store: AdapterStore, tiny_plm: str, tmp_path: Path) -> None:
    publish(store, tiny_plm, "g1", USERS)
    weights = Path(tiny_plm) / "model.safetensors"
    original = weights.read_bytes()
    weights.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    try:
        with pytest.raises(ModelError, match="other weights"):
            load_generation(store)
    finally:
        weights.write_bytes(original)


class Pulls:
    """A store's pull that counts, waits and fails as told."""

    def __init__(self, adapter: UserAdapter | None) -> None:
        self.adapter, self.count, self.failure = adapter, 0, None  # type: ignore[var-annotated]
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, key: bytes, at_least: str) -> UserAdapter | None:
        self.count += 1
        self.gate.wait(5)
        if self.failure is not None:
            raise self.failure
        return self.adapter


def cache_of(pulls: Pulls, **changes: float) -> AdapterCache:
    settings = {"budget_bytes": 10_000, "max_age_s": 60.0, "unknown_ttl_s": 60.0, **changes}
    return AdapterCache(pulls, **settings)  # type: ignore[arg-type]


def test_many_requests_for_one_user_cause_one_load(engine: InferenceEngine) -> None:
    adapter = fresh(engine, USERS[0], np.ones(DIM))
    pulls = Pulls(adapter)
    pulls.gate.clear()
    cache = cache_of(pulls)
    threads = [threading.Thread(target=lambda: cache.get_many([adapter.key])) for _ in range(10)]
    for thread in threads:
        thread.start()
    pulls.gate.set()
    for thread in threads:
        thread.join()
    assert pulls.count == 1
    assert cache.get_many([adapter.key])[adapter.key].adapter is adapter and pulls.count == 1


def test_the_cache_stays_within_its_budget_and_forgets_unknown_users_after_their_time(engine: InferenceEngine) -> None:
    pulls = Pulls(None)
    cache = cache_of(pulls, budget_bytes=2048)
    for place in range(50):
        cache.get_many([place.to_bytes(16, "big")])
    assert cache._entries.currsize <= 2048 and len(cache._entries) == 4
    forgetful = cache_of(pulls, unknown_ttl_s=0.0)
    before = pulls.count
    forgetful.get_many([b"k" * 16])
    forgetful.get_many([b"k" * 16])
    assert pulls.count == before + 2


def test_a_store_that_fails_gives_the_population_with_a_reason_and_cached_users_stay_personal(engine: InferenceEngine) -> None:
    adapter = fresh(engine, USERS[0], np.ones(DIM))
    pulls = Pulls(adapter)
    cache = cache_of(pulls, max_age_s=0.0)
    assert cache.get_many([adapter.key])[adapter.key].adapter is adapter
    pulls.failure = StoreError("down")
    assert cache.get_many([adapter.key])[adapter.key].adapter is adapter
    assert cache.get_many([b"x" * 16])[b"x" * 16].failure == "store_unavailable"
    pulls.failure = CorruptObjectError("bits")
    assert cache.get_many([b"y" * 16])[b"y" * 16].failure == "adapter_corrupt"
    pulls.failure = None
    assert cache.get_many([b"x" * 16])[b"x" * 16].failure is None, "a failure must not be remembered"


def test_a_load_that_was_running_when_the_user_was_evicted_is_not_kept(engine: InferenceEngine) -> None:
    adapter = fresh(engine, USERS[0], np.ones(DIM))
    pulls = Pulls(adapter)
    pulls.gate.clear()
    cache = cache_of(pulls)
    reader = threading.Thread(target=lambda: cache.get_many([adapter.key]))
    reader.start()
    while not pulls.count:
        pass
    cache.evict([adapter.key])
    pulls.gate.set()
    reader.join()
    cache.get_many([adapter.key])
    assert pulls.count == 2


def test_a_pull_that_was_running_when_an_adapter_was_put_never_replaces_it(engine: InferenceEngine) -> None:
    older = fresh(engine, USERS[0], np.ones(DIM))
    newer = fresh(engine, USERS[0], np.zeros(DIM))
    pulls = Pulls(older)
    pulls.gate.clear()
    cache = cache_of(pulls)
    reader = threading.Thread(target=lambda: cache.get_many([older.key]))
    reader.start()
    while not pulls.count:
        pass
    cache.put(newer)
    pulls.gate.set()
    reader.join()
    assert cache.get_many([older.key])[older.key].adapter is newer and pulls.count == 1


def test_a_closed_engine_says_so_to_whoever_comes_late(engine: InferenceEngine) -> None:
    cache = cache_of(Pulls(None))
    cache.close()
    with pytest.raises(EngineClosed):
        cache.get_many([b"k" * 16])


def test_an_adapter_admitted_after_its_users_erasure_is_not_served(engine: InferenceEngine, store: AdapterStore) -> None:
    adapter = fresh(engine, "somebody", np.ones(DIM))
    store.erase(adapter.key)
    store.tombstones()  # the readers of a store share what it knows
    engine.admit(adapter)
    assert engine.predict([("somebody", TEXTS[0])])[0].personalization == "population"
