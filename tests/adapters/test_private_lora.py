"""The kind `lora`: every row its own user's matrices, users in blocks, and the population for who has none."""

from __future__ import annotations

import peft
import pytest
import torch

from plora_ray.adapters.model import AdapterSpec, PersonalizedModel
from plora_ray.errors import ModelError
from tests.adapters.tiny import CONFIGS, batch, plm

FAMILIES = sorted(CONFIGS)


def private(family: str, dropout: float = 0.0) -> PersonalizedModel:
    """A model of the kind whose population is as if trained: nothing is zero."""
    model = PersonalizedModel(
        plm(family), AdapterSpec(model="tiny", task="classification", outputs=3, rank=4, alpha=8.0, dropout=dropout, kind="lora")
    ).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.shared_parameters().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def users(model: PersonalizedModel, count: int) -> torch.Tensor:
    away = torch.randn(count, model.user_width, generator=torch.Generator().manual_seed(3)) * 0.2
    return model.population_vector() + away


@pytest.mark.parametrize("family", FAMILIES)
def test_a_user_alone_is_pefts_lora_with_that_users_matrices(family: str) -> None:
    model = private(family)
    vectors = users(model, 5)
    ids, mask = batch()
    targets = list(model.family.targets)
    other = peft.get_peft_model(plm(family), peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)).eval()
    with torch.no_grad():
        together = model.represent(ids, mask, vectors)
        for row in range(5):
            matrices = model.user_matrices(vectors[row])
            for name, module in other.base_model.model.named_modules():
                if hasattr(module, "lora_A"):
                    module.lora_A["default"].weight.copy_(matrices[name][0])
                    module.lora_B["default"].weight.copy_(matrices[name][1])
            hidden = other(input_ids=ids[row : row + 1], attention_mask=mask[row : row + 1]).last_hidden_state
            pooled = model.represent(ids[row : row + 1], mask[row : row + 1], vectors[row : row + 1])
            assert torch.allclose(together[row], pooled[0], atol=1e-5), "a mixed batch must equal its rows one by one"
            if model.family.pooling == "mean":
                expected = (hidden * mask[row, :, None]).sum(1) / mask[row].sum()
                assert torch.allclose(together[row], expected[0], atol=1e-5)


def test_the_layer_is_the_formula_written_out_row_by_row() -> None:
    model = private("bert")
    name, layer = next(iter(model._layers.items()))
    vectors = users(model, 3)
    x = torch.randn(6, 5, 32)
    model.context.enter(vectors, 6)
    y = layer(x)
    for row in range(6):
        a, b = model.user_matrices(vectors[row // 2])[name]
        for token in range(5):
            expected = layer.weight @ x[row, token] + layer.bias + 8 / 4 * b @ (a @ x[row, token])
            assert torch.allclose(y[row, token], expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["plora", "lora"])
def test_blocks_of_rows_equal_the_same_rows_with_their_users_repeated_in_values_and_gradients(kind: str) -> None:
    spec = AdapterSpec(model="tiny", task="classification", outputs=3, rank=4, alpha=8.0, user_dim=5, kind=kind)  # type: ignore[arg-type]
    model = PersonalizedModel(plm("bert"), spec).eval()
    with torch.no_grad():
        for parameter in model.shared_parameters().values():
            parameter.normal_(std=0.2)
    ids, mask = batch(rows=6)
    blocks = users(model, 3).requires_grad_(True)
    model(ids, mask, blocks).square().sum().backward()
    repeated = blocks.detach().repeat_interleave(2, 0).requires_grad_(True)
    logits = model(ids, mask, repeated)
    logits.square().sum().backward()
    assert torch.allclose(model(ids, mask, blocks), logits, atol=1e-5)
    assert blocks.grad is not None and repeated.grad is not None
    assert torch.allclose(blocks.grad, repeated.grad.view(3, 2, -1).sum(1), atol=1e-4)
    with pytest.raises(ModelError, match="6 rows can't be divided among 4 users"):
        model(ids, mask, users(model, 4))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_populations_record_in_a_mixed_batch_is_the_population_also_when_serving(family: str) -> None:
    model = private(family, dropout=0.1)
    ids, mask = batch()
    with torch.no_grad():
        population = model(ids, mask)
        record = model.population_vector()
        given = model.population_vector({name: tensor.detach() for name, tensor in model.shared_parameters().items()})
        assert torch.equal(record, given) and record.shape == (model.user_width,)
        mixed = users(model, 5)
        mixed[1] = mixed[3] = record
        folded = model.fold()
        assert torch.equal(folded.population_vector(), record)
        answers = folded(ids, mask, mixed)
        assert torch.allclose(folded(ids, mask), population, atol=1e-6)
    assert torch.allclose(answers[[1, 3]], population[[1, 3]], atol=1e-5)
    assert (answers - population)[[0, 2, 4]].abs().amax(1).min() > 1e-3


def test_a_spec_without_a_kind_is_of_the_first_kind() -> None:
    spec = AdapterSpec(model="tiny", task="regression", outputs=1)
    old = {name: value for name, value in spec.to_json().items() if name != "kind"}
    assert AdapterSpec.from_json(old) == spec and spec.kind == "plora"
