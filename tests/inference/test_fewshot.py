"""Fits of a few examples: users never influence one another, and what is known of rows and users is kept to."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from plora_ray.adapters.forgetting import Forgetting
from plora_ray.adapters.solver import UserFit
from plora_ray.errors import DataError
from plora_ray.inference import Examples, FewShotFitter, InferenceEngine
from tests.generations import DIM, LABELS
from tests.inference.conftest import TEXTS


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


def test_a_generation_that_forgets_rows_fits_new_users_examples_as_if_it_did_not(engine: InferenceEngine) -> None:
    assert engine.loaded.prior is not None
    forgetful = replace(engine.loaded, prior=replace(engine.loaded.prior, forgetting=Forgetting(10.0, 20_000.0, 0.3)))
    asked = [Examples(TEXTS, ["yes", "no", "yes", "perhaps"]), Examples(TEXTS[:1], ["no"], start=np.full(DIM, 0.7, np.float32))]
    for found, plain in zip(FewShotFitter(forgetful).fit_many(asked), FewShotFitter(engine.loaded).fit_many(asked), strict=True):
        assert np.array_equal(found.vector, plain.vector)


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
