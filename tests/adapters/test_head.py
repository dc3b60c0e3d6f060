"""What the task head hears of a user, against the formula written out."""

from __future__ import annotations

import pytest
import torch

from plora_ray.adapters.fit import linearise
from plora_ray.adapters.head import TaskHead, UserTerms, leanings
from plora_ray.adapters.model import AdapterSpec, PersonalizedModel
from plora_ray.adapters.peft_export import head_tensors
from tests.adapters.test_model import trained, users
from tests.adapters.tiny import batch, plm

TERMS: list[UserTerms] = ["none", "bias", "taste"]


@pytest.mark.parametrize("terms", TERMS)
def test_the_heads_logits_are_the_formulas(terms: UserTerms) -> None:
    head = TaskHead(6, 3, terms=terms, rank=2, user_dim=5)
    h, p = torch.randn(4, 6), torch.randn(2, 5)  # two users, two adjacent rows each
    found = head(h, p)
    for row in range(4):
        z = head.weight @ h[row] + head.bias
        if terms != "none":
            z = z + head.H @ p[row // 2]
        if terms == "taste":
            z = z + head.M @ torch.diag(head.Q @ p[row // 2]) @ head.D @ h[row]
        assert torch.allclose(found[row], z, atol=1e-6)


@pytest.mark.parametrize("terms", TERMS)
def test_a_zero_vector_is_the_population_to_the_bit_and_a_user_s_head_is_one_linear_head(terms: UserTerms) -> None:
    model = trained("bert", head_terms=terms)
    ids, mask = batch()
    with torch.no_grad():
        assert torch.equal(model(ids, mask, torch.zeros(5, 5)), model(ids, mask))
        vector = users(1)[0]
        own = head_tensors(model, vector)
        expected = model.represent(ids, mask, vector.expand(5, -1)) @ own["weight"].T + own["bias"]
        assert torch.allclose(model(ids, mask, vector.expand(5, -1)), expected, atol=1e-5)


def test_logits_are_exactly_linear_in_the_user_where_only_the_head_hears_it() -> None:
    model = trained("bert", head_terms="taste", targets=("query",))
    with torch.no_grad():
        for name, parameter in model.shared_parameters().items():
            if name.endswith(".P"):
                parameter.zero_()
    ids, mask = batch()
    vectors = users(5)
    logits, jacobian = linearise(model, ids, mask, torch.zeros(5), "classification")
    with torch.no_grad():
        truth = model(ids, mask, vectors)
    differences = (logits[:, :-1] - logits[:, -1:]) + torch.einsum("bfd,bd->bf", jacobian, vectors)
    assert torch.allclose(differences, truth[:, :-1] - truth[:, -1:], atol=1e-4)


def test_a_spec_from_before_the_head_heard_users_is_rebuilt_as_it_was() -> None:
    spec = AdapterSpec(model="tiny", task="classification", outputs=3, rank=4, user_dim=5)
    old = {name: value for name, value in spec.to_json().items() if name != "head_terms"}
    model = PersonalizedModel(plm("bert"), AdapterSpec.from_json(old))
    assert [name for name in model.shared_parameters() if name.startswith("head.")] == ["head.weight", "head.bias"]


@pytest.mark.parametrize(("outputs", "user_dim", "count"), [(1, 4, 1), (2, 4, 1), (3, 64, 2), (10, 64, 9), (40, 16, 8), (3, 1, 0)])
def test_the_last_numbers_of_a_vector_begin_as_leanings_in_all_directions_that_softmax_sees_or_as_many_as_half_of_it_holds(
    outputs: int, user_dim: int, count: int
) -> None:
    spec = AdapterSpec("tiny", "classification" if outputs > 1 else "regression", outputs, user_dim=user_dim, head_terms="bias")
    found = leanings(outputs, user_dim)
    assert spec.leanings == count and found.shape == (outputs, user_dim)
    directions = found[:, user_dim - count :]
    assert not found[:, : user_dim - count].any()
    assert torch.allclose(directions.T @ directions, torch.eye(count), atol=1e-3)
    if outputs > 1:
        assert torch.allclose(directions.sum(0), torch.zeros(count), atol=1e-3)
    else:
        assert torch.equal(directions, torch.ones(1, 1))


def test_a_head_that_hears_nothing_has_no_leanings() -> None:
    assert AdapterSpec("tiny", "classification", 3, user_dim=8).leanings == 0
