"""After a new population, users of retained examples are fitted on it as if their examples had just come."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from plora_ray.inference import Examples, FewShotFitter, LoadedGeneration, load_generation
from plora_ray.inference import refit as refitting
from plora_ray.inference.refit import refit_fresh, unknown_to
from plora_ray.store import AdapterStore
from plora_ray.store.retained import RetainedExamples
from plora_ray.training.compaction import compact
from tests.generations import publish

TEXTS = ["some words", "other words", "more"]
NEW = [f"new-{number}" for number in range(5)]


@pytest.fixture
def world(tiny_plm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[LoadedGeneration, RetainedExamples]:
    """A generation that has ann; five users and ann have retained examples, one of them with a label that it doesn't know."""
    monkeypatch.setattr(refitting, "USERS_AT_ONCE", 4)
    store = AdapterStore(str(tmp_path / "store"))
    publish(store, tiny_plm, "g2", ["ann"], seed=2)
    retained = RetainedExamples(store.objects, 30)
    for place, user in enumerate(["ann", *NEW]):
        retained.keep(store.key(user), TEXTS, ["yes", "no", "unheard-of" if place == 5 else "perhaps"])
    return load_generation(store), retained


def test_every_user_gets_the_adapter_that_its_examples_give_alone_and_a_stopped_refit_goes_on(
    world: tuple[LoadedGeneration, RetainedExamples],
) -> None:
    loaded, retained = world
    fitter, store, told = FewShotFitter(loaded), loaded.store, []

    def stopped(done: int, users: int) -> None:
        told.append((done, users))
        raise InterruptedError

    with pytest.raises(InterruptedError):
        refit_fresh(loaded, fitter, retained, stopped)
    done = refit_fresh(loaded, fitter, retained, lambda done, users: told.append((done, users)))
    assert told == [(4, 6), (4, 6), (6, 6)] and done.fitted + done.standing == 5 and done.standing in (3, 4) and done.refused == 1
    ann = loaded.reader.get(store.key("ann"))
    assert ann is not None
    for user, start in (("ann", ann.record), (NEW[0], None)):
        alone = fitter.fit_many([Examples(TEXTS, ["yes", "no", "perhaps"], start)])[0].vector
        served = store.pull(loaded.reader, store.key(user))
        assert served is not None and (served.source, served.examples) == ("fresh", 3)
        np.testing.assert_allclose(served.record, alone, atol=1e-5)
    assert store.get_fresh(store.key(NEW[4])) is None
    assert refit_fresh(loaded, fitter, retained, lambda done, users: None).fitted == 0


def test_examples_that_the_generation_took_in_with_an_adapter_are_not_counted_again(
    world: tuple[LoadedGeneration, RetainedExamples],
) -> None:
    loaded, retained = world
    store, key = loaded.store, loaded.store.key(NEW[0])
    refit_fresh(loaded, FewShotFitter(loaded), retained, lambda done, users: None)
    compact(store, lambda done, users: None)
    later = load_generation(store)
    assert later.reader.lookup(key) is not None and unknown_to(later, key, retained.of(key)).texts == []
    retained.keep(key, ["since then"], ["no"])
    assert unknown_to(later, key, retained.of(key)).texts == ["since then"]
    assert unknown_to(later, store.key(NEW[4]), retained.of(store.key(NEW[4]))).texts == TEXTS, "one whom it doesn't hold"
    assert unknown_to(loaded, store.key("ann"), retained.of(store.key("ann"))).texts == TEXTS, "a population knows no examples"


def test_an_erased_user_is_not_fitted_again(world: tuple[LoadedGeneration, RetainedExamples]) -> None:
    loaded, retained = world
    key = loaded.store.key(NEW[0])
    data = loaded.store.objects.read(f"examples/{key.hex()[:2]}/{key.hex()}.safetensors")
    loaded.store.erase(key)
    loaded.store.objects.write(f"examples/{key.hex()[:2]}/{key.hex()}.safetensors", data)  # as a process left it that ended too early
    refit_fresh(loaded, FewShotFitter(loaded), retained, lambda done, users: None)
    assert loaded.store.get_fresh(key) is None
