"""Whole models: every family, folding, mixed batches, pooling, and the population."""

from __future__ import annotations

import copy

import peft
import pytest
import torch

from plora_ray.adapters.model import AdapterSpec, PersonalizedModel, pool
from plora_ray.adapters.objective import MutualInformation, PopulationObjective, task_losses
from plora_ray.errors import ModelError
from tests.adapters.tiny import CONFIGS, batch, plm

FAMILIES = sorted(CONFIGS)


def trained(family: str, **changes: object) -> PersonalizedModel:
    """A model of the family whose adapters are as if trained: nothing is zero."""
    spec = AdapterSpec(**{"model": "tiny", "task": "classification", "outputs": 3, "rank": 4, "alpha": 8.0, "user_dim": 5, **changes})  # type: ignore[arg-type]
    model = PersonalizedModel(plm(family), spec).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.shared_parameters().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def users(rows: int, dim: int = 5) -> torch.Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", FAMILIES)
def test_folded_and_training_form_agree(family: str) -> None:
    model = trained(family)
    ids, mask = batch()
    with torch.no_grad():
        for vectors in (users(5), None):
            expected = model(ids, mask, vectors)
            folded = copy.deepcopy(model).fold()
            assert torch.allclose(folded(ids, mask, vectors), expected, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_equals_the_same_rows_one_by_one(family: str) -> None:
    model = trained(family).fold()
    ids, mask = batch()
    vectors = users(5)
    with torch.no_grad():
        together = model(ids, mask, vectors)
        for row in range(5):
            length = int(mask[row].sum())
            alone = model(ids[row : row + 1, :length], mask[row : row + 1, :length], vectors[row : row + 1])
            assert torch.allclose(together[row], alone[0], atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_user_changes_the_answer_and_a_zero_vector_is_the_population(family: str) -> None:
    model = trained(family)
    ids, mask = batch()
    with torch.no_grad():
        population = model(ids, mask)
        assert torch.equal(model(ids, mask, torch.zeros(5, 5)), population)
        assert (model(ids, mask, users(5)) - population).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_the_shared_parameters_and_the_batchs_users_only(family: str) -> None:
    model = trained(family).train()
    ids, mask = batch()
    vectors = users(5).requires_grad_(True)
    task_losses(model(ids, mask, vectors), torch.tensor([0, 1, 2, 0, 1]), "classification")[:4].sum().backward()
    shared = set(map(id, model.shared_parameters().values()))
    for parameter in model.parameters():
        assert (parameter.grad is not None) == (id(parameter) in shared)
    assert vectors.grad is not None
    assert (vectors.grad[:4] != 0).any(dim=1).all() and not vectors.grad[4].any()


@pytest.mark.parametrize(
    ("family", "targets"), [("bert", ["query", "value"]), ("llama", ["q_proj", "v_proj"]), ("distilbert", ["q_lin", "v_lin"])]
)
def test_without_a_user_the_model_is_pefts_lora(family: str, targets: list[str]) -> None:
    model = trained(family)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, lora_bias=True)
    other = peft.get_peft_model(plm(family), config)
    shared = model.shared_parameters()
    with torch.no_grad():
        for name, module in other.base_model.model.named_modules():
            if hasattr(module, "lora_A"):
                module.lora_A["default"].weight.copy_(shared[f"layers.{name}.A"])
                module.lora_B["default"].weight.copy_(shared[f"layers.{name}.B"])
                module.lora_B["default"].bias.copy_(shared[f"layers.{name}.B"] @ shared[f"layers.{name}.q"])
        ids, mask = batch()
        expected = other.eval()(input_ids=ids, attention_mask=mask).last_hidden_state
        found = model.plm(input_ids=ids, attention_mask=mask).last_hidden_state
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("how", ["mean", "first", "last"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_never_changes_a_pooled_vector(how: str, side: str) -> None:
    hidden = torch.randn(1, 4, 6)
    alone = pool(hidden, torch.ones(1, 4, dtype=torch.long), how)  # type: ignore[arg-type]
    noise, zeros, ones = torch.randn(1, 3, 6), torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 4, dtype=torch.long)
    parts = [(noise, zeros), (hidden, ones)] if side == "left" else [(hidden, ones), (noise, zeros)]
    padded = pool(torch.cat([part[0] for part in parts], 1), torch.cat([part[1] for part in parts], 1), how)  # type: ignore[arg-type]
    assert torch.allclose(padded, alone, atol=1e-6)


def test_any_linear_layer_can_be_named_and_a_wrong_name_lists_what_there_is() -> None:
    model = trained("bert", targets=("layer.0.intermediate.dense", "attention.output.dense"))
    assert len([name for name in model.shared_parameters() if name.endswith(".A")]) == 3
    with pytest.raises(ModelError, match="'qury' matches no layer.*query"):
        trained("bert", targets=("qury",))
    with pytest.raises(ModelError, match="not a linear layer"):
        trained("bert", targets=("attention",))


def test_an_unlisted_family_works_once_targets_and_pooling_are_named() -> None:
    model = plm("bert")
    model.config.model_type = "somethingnew"
    spec = AdapterSpec(model="tiny", task="regression", outputs=1, rank=2, alpha=2.0, user_dim=3)
    with pytest.raises(ModelError, match="set adapter.targets and model.pooling"):
        PersonalizedModel(model, spec)
    named = AdapterSpec(**{**spec.to_json(), "targets": ("query",), "pooling": "mean"})
    assert PersonalizedModel(model, named)(*batch()).shape == (5, 1)


def test_mutual_information_adds_its_two_terms_with_the_weight_and_detaches_the_population() -> None:
    model = trained("bert")
    ids, mask = batch()
    vectors, labels, weights = users(5), torch.tensor([0, 1, 2, 0, 1]), torch.ones(5)

    def loss(weight: float, layer: bool, logit: bool) -> torch.Tensor:
        information = MutualInformation(weight=weight, layer_term=layer, logit_term=logit)
        objective = PopulationObjective(model, user_dropout=0.0, mutual_information=information).train()
        result: torch.Tensor = objective(ids, mask, vectors, labels, weights)
        return result

    plain = loss(0.0, True, True)
    user = torch.log_softmax(model(ids, mask, vectors) / 4, -1)
    nobody = torch.log_softmax(model(ids, mask) / 4, -1)
    divergence = (user.exp() * (user - nobody)).sum(1).mean()
    assert torch.allclose(loss(0.5, False, True), plain + 0.5 * divergence, atol=1e-5)
    effects = [2.0 * vectors @ layer.P.T @ layer.B.T for layer in model._layers.values()]
    layer_mse = torch.stack([effect.square().mean() for effect in effects]).mean()
    assert torch.allclose(loss(0.5, True, False), plain + 0.5 * layer_mse, atol=1e-5)


def test_personalised_dropout_keeps_each_rows_user_with_probability_one_minus_rho() -> None:
    model = trained("bert")
    objective = PopulationObjective(model, user_dropout=0.25, mutual_information=MutualInformation()).train()
    kept = objective._drop_users(torch.ones(20_000, 3))
    assert set(kept.sum(1).tolist()) == {0.0, 3.0}
    assert kept.mean().item() == pytest.approx(0.75, abs=0.02)
    assert torch.equal(objective.eval()._drop_users(torch.ones(10, 3)), torch.ones(10, 3))


def test_rows_of_weight_zero_change_nothing() -> None:
    objective = PopulationObjective(trained("bert"), user_dropout=0.0, mutual_information=MutualInformation()).train()
    ids, mask = batch()
    labels = torch.tensor([0, 1, 2, 0, 1])
    some = objective(ids, mask, users(5), labels, torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0]))
    only = objective(ids[:2], mask[:2], users(5)[:2], labels[:2], torch.ones(2))
    assert torch.allclose(some, only, atol=1e-6)


def test_an_idle_pass_teaches_nothing_also_with_mutual_information() -> None:
    model = trained("bert")
    objective = PopulationObjective(model, user_dropout=0.0, mutual_information=MutualInformation(weight=0.5)).train()
    ids, mask = batch()
    loss = objective(ids, mask, users(5), torch.tensor([0, 1, 2, 0, 1]), torch.zeros(5))
    loss.backward()
    assert loss.item() == 0.0
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.shared_parameters().values())
