"""Recomputing blocks, and running a PLM in two halves, change no number."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plora_ray.adapters.blocks import checkpoint_blocks, find_blocks
from plora_ray.adapters.halves import Halves
from plora_ray.adapters.model import AdapterSpec, PersonalizedModel
from plora_ray.adapters.objective import MutualInformation, PopulationObjective
from plora_ray.errors import ModelError
from tests.adapters import tiny

LABELS = torch.tensor([0, 1, 2, 0, 1])


def model_of(family: str) -> PersonalizedModel:
    """A personalised model with random adapters."""
    model = PersonalizedModel(tiny.plm(family), AdapterSpec(family, "classification", 3, rank=4, user_dim=3, dropout=0.1))
    torch.manual_seed(2)
    for parameter in model.shared_parameters().values():
        nn.init.normal_(parameter, std=0.2)
    return model


def gradients(model: PersonalizedModel) -> tuple[dict[str, Tensor], Tensor, int]:
    """Gradients of one training step with all loss terms, the users' gradients, and the bytes kept for the backward pass."""
    ids, mask = tiny.batch()
    vectors = torch.randn(5, 3, generator=torch.Generator().manual_seed(4)).requires_grad_(True)
    objective = PopulationObjective(model, user_dropout=0.2, mutual_information=MutualInformation(weight=0.5)).train()
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(5)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = objective(ids, mask, vectors, LABELS, torch.ones(5))
    loss.backward()
    assert vectors.grad is not None
    shared = {name: parameter.grad for name, parameter in model.shared_parameters().items() if parameter.grad is not None}
    return shared, vectors.grad, sum(size for place, size in kept.items() if place not in own)


@pytest.mark.parametrize("family", ["bert", "t5", "modernbert", "llama"])
def test_gradient_checkpointing_changes_no_gradient_and_keeps_far_fewer_bytes(family: str) -> None:
    plain, plain_users, plain_bytes = gradients(model_of(family))
    model = model_of(family)
    checkpoint_blocks(model.plm, model.context)
    again, again_users, again_bytes = gradients(model)
    assert plain.keys() == again.keys() == model.shared_parameters().keys()
    for name in plain:
        assert torch.allclose(plain[name], again[name], atol=1e-6), name
    assert torch.allclose(plain_users, again_users, atol=1e-6)
    assert again_bytes < 0.5 * plain_bytes


@pytest.mark.parametrize("family", sorted(tiny.CONFIGS))
def test_the_blocks_of_every_family_are_found(family: str) -> None:
    model = model_of(family)
    _, blocks = find_blocks(model.plm)
    assert len(blocks) == 2
    assert set(model._layers.values()) <= {module for block in blocks for module in block.modules()}


def test_top_layers_leave_the_lower_blocks_without_adapters() -> None:
    spec = AdapterSpec("bert", "classification", 3, rank=4, user_dim=3, top_layers=1)
    names = {f"encoder.layer.1.attention.self.{part}" for part in ("query", "value")}
    assert set(PersonalizedModel(tiny.plm("bert"), spec)._layers) == names
    with pytest.raises(ModelError, match="top_layers is 3, but BertModel has 2 blocks"):
        PersonalizedModel(tiny.plm("bert"), replace(spec, top_layers=3))
    with pytest.raises(ModelError, match="no adapter target"):
        PersonalizedModel(tiny.plm("bert"), replace(spec, top_layers=1, targets=("layer.0.attention.self.query",)))


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ModelError, match="no list of equal blocks"):
        find_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))


@pytest.mark.parametrize("family", sorted(tiny.CONFIGS))
def test_the_two_halves_together_are_the_whole_and_each_runs_only_its_own_blocks(family: str) -> None:
    plm = tiny.plm(family)
    halves = Halves(plm, 1)
    ids, mask = tiny.batch()
    with torch.no_grad():
        whole = plm(input_ids=ids, attention_mask=mask).last_hidden_state
        runs = _count(plm)
        hidden = halves.lower(ids, mask)
        assert runs == [1, 0]
        with halves.above(hidden * mask.unsqueeze(-1)):
            again = plm(input_ids=ids, attention_mask=mask).last_hidden_state
        assert runs == [1, 1]
        assert torch.allclose(again[mask.bool()], whole[mask.bool()], atol=1e-6)
        assert torch.equal(plm(input_ids=ids, attention_mask=mask).last_hidden_state, whole), "the model must be whole again"


def _count(plm: nn.Module) -> list[int]:
    """Runs of each block from here on, seen at its first child."""
    blocks = find_blocks(plm)[1]
    runs = [0] * len(blocks)

    def seen(place: int) -> None:
        runs[place] += 1

    for place, block in enumerate(blocks):
        leaf = next(module for module in block.modules() if isinstance(module, nn.Linear))
        leaf.register_forward_hook(lambda *_, place=place: seen(place))
    return runs


class _Carrying(nn.Module):
    """A PLM whose blocks share more than hidden states: a running sum outside of them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        hidden = self.embedding(input_ids)
        total = torch.zeros_like(hidden)
        for layer in self.layers:
            hidden = layer(hidden)
            total = total + hidden
        return type("Output", (), {"last_hidden_state": total})


def test_a_model_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ModelError, match="can't be cut below its top 1 blocks"):
        Halves(_Carrying(), 1)
