"""The engine: each row its own user's answer, one generation an answer, adapters as the store has them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from plora_ray.adapters.forgetting import Forgetting
from plora_ray.adapters.solver import UserFit
from plora_ray.errors import CorruptObjectError, DataError, ModelError, StoreError
from plora_ray.inference import Examples, FewShotFitter, InferenceEngine, load_generation
from plora_ray.inference.batcher import Batcher, EngineClosed, QueueFull
from plora_ray.inference.cache import AdapterCache
from plora_ray.store import AdapterStore, UserAdapter, new_version
from plora_ray.store.adapters import now_iso
from tests.generations import DIM, LABELS, publish

USERS = [f"person {index}" for index in range(20)]
TEXTS = ["a short text", "another text that is quite a bit longer than the first one", "x", "what do you think of this?"]


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(str(tmp_path / "store"))


@pytest.fixture
def engine(store: AdapterStore, tiny_plm: str) -> Iterator[InferenceEngine]:
    publish(store, tiny_plm, "g1", USERS)
    engine = InferenceEngine(load_generation(store))
    yield engine
    engine.close()


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


def test_a_few_shot_fit_lowers_the_users_loss_and_is_the_same_alone_and_among_others(engine: InferenceEngine) -> None:
    fitter = FewShotFitter(engine.loaded)
    mine = Examples(TEXTS, ["yes", "no", "yes", "perhaps"])
    others = [Examples(TEXTS[:count], ["no"] * count) for count in (1, 2, 3)]
    together = fitter.fit_many([others[0], mine, *others[1:]])[1]
    alone = fitter.fit_many([mine])[0]
    assert alone.loss_after < alone.loss_before
    assert np.allclose(alone.vector, together.vector, atol=1e-5)
    with pytest.raises(DataError, match="'maybe' is not one of this model's: no, perhaps, yes"):
        fitter.fit_many([Examples(["x"], ["maybe"])])


def test_new_examples_move_a_known_user_on_from_the_trained_vector(engine: InferenceEngine) -> None:
    fitter = FewShotFitter(engine.loaded)
    start = np.full(DIM, 0.7, np.float32)
    moved = fitter.fit_many([Examples(TEXTS[:1], ["yes"], start=start)])[0]
    assert 0 < np.linalg.norm(moved.vector - start) < np.linalg.norm(moved.vector)


def test_of_a_new_users_examples_as_much_is_kept_as_lasts_and_all_that_newer_ones_add_to_a_known_user(engine: InferenceEngine) -> None:
    start = np.full(DIM, 0.7, np.float32)
    asked = [Examples(TEXTS, ["yes", "no", "yes", "perhaps"]), Examples(TEXTS[:2], ["yes", "no"], start=start)]
    assert engine.loaded.prior is not None
    fading = replace(engine.loaded, prior=replace(engine.loaded.prior, lasting=0.5))
    whole, kept = FewShotFitter(engine.loaded).fit_many(asked), FewShotFitter(fading).fit_many(asked)
    assert np.allclose(kept[0].vector, 0.5 * whole[0].vector, atol=1e-6), "the prior's mean is zero"
    assert np.array_equal(kept[1].vector, whole[1].vector)


def test_examples_count_by_their_age_and_undated_ones_as_new(engine: InferenceEngine) -> None:
    assert engine.loaded.prior is not None
    forgetful = replace(engine.loaded, prior=replace(engine.loaded.prior, forgetting=Forgetting(10.0, 20_000.0)))
    fitter, labels, new = FewShotFitter(forgetful), ["yes", "no", "yes", "perhaps"], np.datetime64("2030-01-01", "us")
    old = np.array([np.datetime64("2000-01-01", "us")] * 2 + [new] * 2)
    undated, dated, fewer = Examples(TEXTS, labels), Examples(TEXTS, labels, times=old), Examples(TEXTS[2:], labels[2:])
    whole, aged, without = fitter.fit_many([undated, dated, fewer])
    assert np.array_equal(whole.vector, FewShotFitter(engine.loaded).fit_many([undated])[0].vector)
    assert np.allclose(aged.vector, without.vector, atol=1e-6) and not np.allclose(aged.vector, whole.vector, atol=1e-3)


def test_a_guarded_few_shot_fit_leaves_whom_it_would_harm_at_what_he_had(engine: InferenceEngine) -> None:
    """Labels drawn as the population expects them: there is nothing to learn of such a user but chance."""
    generator, texts = np.random.default_rng(1), [f"{text} {number}" for number in range(6) for text in TEXTS]
    chances = [list(answer.prediction.scores.values()) for answer in engine.predict([("nobody", text) for text in texts])]
    drawn = [[LABELS.classes[generator.choice(3, p=np.array(row) / sum(row))] for row in chances] for _ in range(12)]
    starts = [None, np.full(DIM, 0.01, np.float32)] * 6
    by_lot = [Examples(texts, labels, start) for labels, start in zip(drawn, starts, strict=True)]
    mine = Examples(texts, ["yes"] * len(texts))
    assert engine.loaded.prior is not None
    wide = replace(engine.loaded, prior=replace(engine.loaded.prior, precision=engine.loaded.prior.precision / 100))
    plain = FewShotFitter(wide).fit_many([*by_lot, mine])
    guarded = FewShotFitter(replace(wide, fit=UserFit(guard=True))).fit_many([*by_lot, mine])
    left = [place for place, start in enumerate(starts) if np.array_equal(guarded[place].vector, np.zeros(DIM) if start is None else start)]
    assert {place % 2 for place in left} == {0, 1}, "new users and known ones"
    assert all(guarded[place].loss_after == guarded[place].loss_before for place in left)
    for place in {*range(13)} - {*left}:
        assert np.array_equal(guarded[place].vector, plain[place].vector)
    assert guarded[12].loss_after < guarded[12].loss_before


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


def batcher_of(sizes: list[tuple[int, int]], gate: threading.Event, **changes: float) -> Batcher:
    """A batcher whose forward pass records (rows, longest) and returns each row's length."""

    def forward(ids: object, vectors: object) -> torch.Tensor:
        gate.wait(5)
        lengths = [len(row) for row in ids]  # type: ignore[attr-defined]
        sizes.append((len(lengths), max(lengths)))
        return torch.tensor([[float(length)] for length in lengths])

    return Batcher(forward, **{"max_tokens": 40, "max_rows": 8, "wait_s": 0.0, "max_queued": 100, **changes})  # type: ignore[arg-type]


def test_batches_are_bounded_in_padded_tokens_and_every_row_gets_its_own_result() -> None:
    sizes: list[tuple[int, int]] = []
    gate = threading.Event()
    batcher = batcher_of(sizes, gate)
    lengths = [3, 9, 1, 20, 5, 5, 5, 40, 2, 60, 1]
    futures = batcher.submit([([1] * length, None) for length in lengths])
    gate.set()
    assert [future.result(5).item() for future in futures] == lengths
    assert all(rows * longest <= 40 or rows == 1 for rows, longest in sizes) and all(rows <= 8 for rows, _ in sizes)
    batcher.close()
    with pytest.raises(EngineClosed):
        batcher.submit([([1], None)])


def test_rows_of_like_lengths_share_a_batch_and_the_oldest_row_is_in_the_first() -> None:
    sizes: list[tuple[int, int]] = []
    gate = threading.Event()
    batcher = batcher_of(sizes, gate, max_tokens=1000, pass_tokens=20)
    blocker = batcher.submit([([1], None)])
    while batcher._rows:  # it holds the model while the others queue up
        pass
    lengths = [50, 3, 3, 48, 4, 50, 3, 49]
    futures = batcher.submit([([1] * length, None) for length in lengths])
    gate.set()
    assert [future.result(5).item() for future in blocker + futures] == [1, *lengths]
    batcher.close()
    assert sizes == [(1, 1), (4, 50), (4, 4)]


def test_a_long_row_among_a_stream_of_short_ones_waits_for_no_more_than_one_batch() -> None:
    sizes: list[tuple[int, int]] = []
    gate = threading.Event()
    batcher = batcher_of(sizes, gate, max_tokens=1000, max_rows=4, max_queued=1000)
    blocker = batcher.submit([([1], None)])
    while batcher._rows:
        pass
    batcher.submit([([1] * 2, None)] * 3)
    long = batcher.submit([([1] * 90, None)])
    rest = batcher.submit([([1] * 2, None)] * 40)
    gate.set()
    for future in blocker + long + rest:
        future.result(5)
    batcher.close()
    assert sizes.index((1, 90)) == 2, "after the blocker and the batch of the rows before it"


def test_padding_that_costs_less_than_one_more_pass_is_taken() -> None:
    sizes: list[tuple[int, int]] = []
    gate = threading.Event()
    batcher = batcher_of(sizes, gate, max_tokens=1000, pass_tokens=40)
    blocker = batcher.submit([([1], None)])
    while batcher._rows:
        pass
    futures = batcher.submit([([1] * length, None) for length in (10, 2, 2, 2)])
    gate.set()
    for future in blocker + futures:
        future.result(5)
    batcher.close()
    assert sizes == [(1, 1), (4, 10)]


def test_a_full_queue_refuses_all_rows_of_a_request_and_cancelled_rows_are_skipped() -> None:
    sizes: list[tuple[int, int]] = []
    gate = threading.Event()
    batcher = batcher_of(sizes, gate, max_queued=3)
    batcher.submit([([1], None)])
    while batcher._rows:  # the first row is being computed and holds the model
        pass
    waiting = batcher.submit([([1, 1], None)] * 3)
    with pytest.raises(QueueFull):
        batcher.submit([([1], None)])
    for future in waiting:
        future.cancel()
    gate.set()
    batcher.close()
    assert sizes == [(1, 1)]


def test_a_failing_pass_fails_its_callers_only() -> None:
    calls = iter([RuntimeError("once"), torch.tensor([[7.0]])])

    def forward(ids: object, vectors: object) -> torch.Tensor:
        result = next(calls)
        if isinstance(result, Exception):
            raise result
        return result

    batcher = Batcher(forward, max_tokens=10, max_rows=1, wait_s=0.0, max_queued=10)
    with pytest.raises(RuntimeError, match="once"):
        batcher.submit([([1], None)])[0].result(5)
    assert batcher.submit([([1], None)])[0].result(5).item() == 7.0
    batcher.close()


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
