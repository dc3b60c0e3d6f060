"""One PLoRA layer: the paper's formula, the released code's numbers, folding, and what learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from plora_ray.adapters.context import UserContext
from plora_ray.adapters.layers import FoldedLinear, PLoRALinear
from plora_ray.adapters.objective import logit_divergence
from plora_ray.errors import ModelError

RELEASED = load_file(Path(__file__).with_name("released_layer.safetensors"))


def released_layer() -> PLoRALinear:
    """A layer with the released layer's parameters, in double precision."""
    base = nn.Linear(16, 12).double()
    layer = PLoRALinear(base, rank=4, alpha=8.0, user_dim=6, dropout=0.0, context=UserContext(), name="layer").double()
    with torch.no_grad():
        for parameter, name in ((base.weight, "W"), (base.bias, "b"), (layer.A, "A"), (layer.B, "B"), (layer.P, "P")):
            parameter.copy_(RELEASED[name])
    return layer


@pytest.mark.parametrize(
    ("vectors", "expected"),
    [(RELEASED["p"], "y_user"), (None, "y_none"), (RELEASED["p"] * RELEASED["mask"].unsqueeze(1), "y_masked")],
)
def test_the_layer_gives_the_released_codes_numbers(vectors: torch.Tensor | None, expected: str) -> None:
    layer = released_layer()
    layer.context.enter(vectors, 3)
    assert torch.allclose(layer(RELEASED["x"]), RELEASED[expected], atol=1e-12)


def test_the_layer_is_the_papers_formula_written_out() -> None:
    layer = released_layer()
    x, p = RELEASED["x"], RELEASED["p"]
    layer.context.enter(p, len(p))
    for row in range(3):
        for token in range(5):
            low = RELEASED["A"] @ x[row, token] + RELEASED["P"] @ p[row]
            y = RELEASED["W"] @ x[row, token] + RELEASED["b"] + 8 / 4 * RELEASED["B"] @ low
            assert torch.allclose(layer(x)[row, token], y, atol=1e-12)


def test_what_everybody_has_in_common_is_added_beside_the_users_term_folded_or_not() -> None:
    layer = released_layer()
    common = torch.randn(4, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        layer.q.copy_(common)
    for users in (RELEASED["p"], None):
        layer.context.enter(users, 3)
        layer.context.terms = {} if users is None else {"layer": users @ layer.user_map().T}
        expected = RELEASED["y_none" if users is None else "y_user"] + 8 / 4 * RELEASED["B"] @ common
        assert torch.allclose(layer(RELEASED["x"]), expected, atol=1e-12)
        assert torch.allclose(FoldedLinear(layer).double()(RELEASED["x"]), expected, atol=1e-6)


def test_the_folded_layer_keeps_the_users_term_that_the_released_merge_loses() -> None:
    layer = released_layer()
    folded = FoldedLinear(layer).double()
    with torch.no_grad():  # folding works in fp32; fold the released numbers in double to compare with them
        folded.weight.copy_(RELEASED["W"] + 2 * RELEASED["B"] @ RELEASED["A"])
        folded.bias.copy_(RELEASED["b"])
    layer.context.enter(None, 3)
    assert torch.allclose(folded(RELEASED["x"]), RELEASED["y_merged_no_user"], atol=1e-12)
    layer.context.enter(RELEASED["p"], 3)
    layer.context.terms = {"layer": RELEASED["p"] @ (2 * RELEASED["B"] @ RELEASED["P"]).T}
    assert torch.allclose(layer.user_map(), 2 * RELEASED["B"] @ RELEASED["P"], atol=1e-6)
    assert torch.allclose(folded(RELEASED["x"]), RELEASED["y_user"], atol=1e-12)


def test_the_recorded_effect_is_the_difference_between_adapter_outputs_with_and_without_the_user() -> None:
    layer = released_layer()
    layer.context.enter(RELEASED["p"], 3)
    layer.context.record_effects = True
    layer(RELEASED["x"])
    difference = RELEASED["mim_with"] - RELEASED["mim_without"]
    assert torch.allclose(layer.context.effects["layer"].unsqueeze(1).expand_as(difference), difference, atol=1e-12)


def test_the_logit_term_of_mutual_information_is_the_released_trainers() -> None:
    divergence = logit_divergence(RELEASED["logits_user"], RELEASED["logits_population"], 4.0)
    assert divergence.item() == pytest.approx(RELEASED["kl"].item(), abs=1e-12)


def test_a_new_layer_changes_nothing_and_leaves_the_frozen_weights_without_gradient() -> None:
    base = nn.Linear(8, 8)
    layer = PLoRALinear(base, rank=2, alpha=4.0, user_dim=3, dropout=0.0, context=UserContext(), name="l")
    x, p = torch.randn(4, 6, 8), torch.randn(4, 3, requires_grad=True)
    layer.context.enter(p, len(p))
    assert torch.equal(layer(x), base(x))
    layer.B.data.normal_()
    layer(x).sum().backward()
    assert base.weight.grad is None and base.bias.grad is None
    assert all(parameter.grad is not None for parameter in (layer.A, layer.B, layer.P, p))


def test_a_layer_that_sees_flattened_rows_is_refused_with_the_reason() -> None:
    layer = PLoRALinear(nn.Linear(8, 8), rank=2, alpha=4.0, user_dim=3, dropout=0.0, context=UserContext(), name="l")
    layer.context.enter(torch.zeros(4, 3), 4)
    with pytest.raises(ModelError, match="name other targets"):
        layer(torch.randn(24, 8))
