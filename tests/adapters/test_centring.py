"""Counting users' vectors from their mean: nobody's answer changes, and nobody's vector becomes the average user's."""

from __future__ import annotations

import pytest
import torch

from plora_ray.adapters.centring import centred
from plora_ray.adapters.head import UserTerms
from plora_ray.adapters.model import AdapterSpec, PersonalizedModel
from tests.adapters.tiny import batch, plm


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("terms", ["none", "bias", "taste"])
@pytest.mark.parametrize("family", ["bert", "llama"])  # with and without biases of its own
def test_vectors_counted_from_a_mean_give_the_logits_that_they_gave_counted_from_zero(family: str, terms: UserTerms, folded: bool) -> None:
    spec = AdapterSpec(model="tiny", task="classification", outputs=3, rank=2, alpha=4.0, user_dim=5, head_terms=terms)
    model = PersonalizedModel(plm(family), spec).eval()
    ids, mask = batch()
    with torch.no_grad():
        for parameter in model.shared_parameters().values():
            parameter.normal_(std=0.3)
        users, mean = torch.randn(5, 5), torch.randn(5)
        of_users, of_the_mean = model(ids, mask, users), model(ids, mask, mean.expand(5, -1))
        model.load_shared(centred(model.shared_parameters(), mean))
        if folded:
            model.fold()
        torch.testing.assert_close(model(ids, mask, users - mean), of_users, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model(ids, mask), of_the_mean, atol=1e-5, rtol=1e-5)
