"""A plan is arithmetic on measured figures: equal to what is reckoned by hand, and never less for more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel, BertConfig, DistilBertConfig, RobertaConfig

from plora_ray.adapters.blocks import find_blocks
from plora_ray.adapters.model import PersonalizedModel
from plora_ray.adapters.pretrained import plm_skeleton
from plora_ray.config import AdapterSettings, Settings
from plora_ray.errors import ConfigError
from plora_ray.sizing import Figures, ModelShape, Plan, Prices, known_models, load_figures, load_prices, make_plan, monthly_cost
from plora_ray.sizing.demand import Demand, parse_demand

GiB = 2**30
ROUND = {
    "core_s_per_answer": 0.01,
    "core_s_per_population_row": 0.03,
    "core_s_per_fitted_row": 0.01,
    "cores_per_gpu": 100,
    "replica_process_bytes": 1_000,
    "index_bytes_per_user": 36,
    "stored_overhead_bytes_per_user": 36,
    "published_users_per_s": 100_000,
    "published_bytes_per_s": 1_000_000,
    "open_s_per_million_users": 0.5,
    "busy_share": 0.5,
}
# Twice the reference's blocks.
MODEL = ModelShape(parameters=5_000, block_parameters=2_000, hidden=10, layers=2)


@pytest.fixture(scope="module")
def figures() -> Figures:
    """Round ones, for a reference of 1,000 block parameters and 10 tokens."""
    measured: dict[str, Any] = {name: {"value": value, "source": "made up"} for name, value in ROUND.items()}
    return Figures.model_validate({"reference_tokens": 10, "reference_block_parameters": 1_000, **measured})


def demand(**changes: Any) -> Demand:
    values = {"users": 100_000, "rps": 1_000, "tokens": 20, "rows_per_user": 10, "epochs": 2, "train_hours": 2.0, **changes}
    return Demand(model=values.pop("model", MODEL), **values)


def test_a_plan_for_vectors_is_what_is_reckoned_by_hand(figures: Figures) -> None:
    plan = make_plan(demand(), figures)
    assert plan.record_bytes == 64 * 4
    assert plan.generation_bytes == 100_000 * (256 + 36 + 32)
    assert plan.storage_bytes == 3 * (32_400_000 + 5_000 * 4)
    # 1,000,000 rows make ceil(1,000,000 / 32,768) = 31 partitions; 5,000 users a wave are 20 full waves at most.
    assert plan.objects == 2 * (31 + 20) + 6
    assert plan.publish_s == pytest.approx(32.4)  # by bytes; by users it is 1
    assert plan.open_s == pytest.approx(0.05)
    # Twice the blocks and twice the tokens: 0.04 core seconds a text.
    assert plan.peak_cores == pytest.approx(40) and plan.replicas == 20 and plan.worker_pods == 21
    # All records are resident, and an eighth more is room for fresh adapters; at a swap there are two of everything.
    assert plan.cache_bytes == 100_000 * 256 * 9 // 8 and plan.cached_share == 1
    assert plan.replica_memory_bytes == 1_000 + 2 * (20_000 + 3_600_000 + 28_800_000)
    # (2 epochs x 0.12 + 0.04) x 1,000,000 rows = 280,000 core seconds = 77.8 core hours; a GPU does 100 of them an hour.
    assert plan.core_hours == pytest.approx(280_000 / 3600)
    assert plan.gpus == 1 and plan.run_hours == pytest.approx(0.7778, abs=1e-4)
    assert make_plan(demand(train_hours=0.1), figures).gpus == 8


def test_private_matrices_are_as_wide_as_the_model_itself_says(figures: Figures) -> None:
    for adapter in (AdapterSettings(kind="lora"), AdapterSettings(kind="lora", rank=4, top_layers=2)):
        spec = Settings(adapter=adapter).adapter_spec(2)
        with torch.device("meta"):
            real = PersonalizedModel(plm_skeleton(spec.model, dtype=torch.float32), spec)
        planned = make_plan(demand(model=known_models()["embedded"], adapter=adapter), figures)
        assert planned.record_bytes == 4 * real.user_width
    with pytest.raises(ConfigError, match="name a --model"):
        make_plan(demand(model=ModelShape.counted(7e9), adapter=AdapterSettings(kind="lora")), figures)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("distilbert-base", DistilBertConfig()),
        ("bert-base", BertConfig()),
        ("bert-large", BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)),
        ("roberta-base", RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)),
        (
            "roberta-large",
            RobertaConfig(
                vocab_size=50265, max_position_embeddings=514, type_vocab_size=1,
                hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
            ),
        ),
        ("embedded", None),
    ],
    ids=lambda value: value if isinstance(value, str) else "real",
)  # fmt: skip
def test_a_known_models_size_is_that_of_the_real_model(name: str, config: Any) -> None:
    shape = known_models()[name]
    with torch.device("meta"):
        pooler = {} if name == "distilbert-base" else {"add_pooling_layer": False}
        real = (
            AutoModel.from_config(config, **pooler) if config is not None else plm_skeleton(shape.settings_name or "", dtype=torch.float32)
        )
    _, blocks = find_blocks(real)
    assert shape.parameters == sum(parameter.numel() for parameter in real.parameters())
    assert shape.block_parameters == sum(parameter.numel() for block in blocks for parameter in block.parameters())
    assert (shape.layers, shape.hidden) == (len(blocks), real.config.hidden_size)


def quantities(plan: Plan) -> list[float]:
    """What can only grow; the hours of a run shrink when one more GPU comes."""
    return [
        plan.generation_bytes, plan.storage_bytes, plan.objects, plan.publish_s, plan.open_s, plan.peak_cores, plan.replicas,
        plan.replica_memory_bytes, plan.cache_bytes, -plan.cached_share, plan.gpus, plan.core_hours,
    ]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    users=st.integers(1, 10**9), more_users=st.integers(0, 10**9), rps=st.floats(0.1, 1e6), more_rps=st.floats(0, 1e6),
    rows=st.integers(1, 2000), kind=st.sampled_from(["plora", "lora"]),
)  # fmt: skip
def test_more_users_or_more_requests_never_need_less(
    users: int, more_users: int, rps: float, more_rps: float, rows: int, kind: Any
) -> None:
    common = {"model": known_models()["bert-base"], "rows_per_user": rows, "adapter": AdapterSettings(kind=kind)}
    small, large = demand(users=users, rps=rps, **common), demand(users=users + more_users, rps=rps + more_rps, **common)
    figures = load_figures()
    plans = make_plan(small, figures), make_plan(large, figures)
    assert all(less <= more for less, more in zip(*map(quantities, plans), strict=True))
    prices = Prices(currency="x", cpu_core_hour=1, memory_gib_hour=1, gpu_hour=1, storage_gib_month=1, requests_per_million=1)
    costs = monthly_cost(plans[0], small, prices).total, monthly_cost(plans[1], large, prices).total
    assert costs[0] <= costs[1] * (1 + 1e-9)


def test_a_month_costs_what_is_reckoned_by_hand(figures: Figures) -> None:
    asked = demand(cache_limit_bytes=19_200_000, runs_per_month=3.0)  # of 76,800,000 that a cache of all users takes
    prices = Prices(currency="EUR", cpu_core_hour=0.05, memory_gib_hour=0, gpu_hour=2, storage_gib_month=0.02, requests_per_million=0.4)
    cost = monthly_cost(make_plan(asked, figures), asked, prices)
    assert cost.serving == pytest.approx(730 * 21 * 4 * 0.05)
    assert cost.training == pytest.approx(3 * 0.77778 * 2, rel=1e-4)
    assert cost.storage == pytest.approx(3 * 32_420_000 / GiB * 0.02)
    assert cost.requests == pytest.approx(2 * 1_000 * 0.75 * 730 * 3600 / 1e6 * 0.4)
    assert cost.total == pytest.approx(cost.serving + cost.training + cost.storage + cost.requests)


def test_every_figure_of_the_package_says_where_it_comes_from() -> None:
    for name, figure in load_figures():
        if hasattr(figure, "source"):
            assert not figure.measured or "python -m benchmarks." in figure.source, name
    assert load_figures(500).cores_per_gpu.value == 500


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "bert-tiny"}, "'bert-tiny' isn't known: name one of embedded, "),
        ({"users": 0}, "--users: Input should be greater than or equal to 1"),
        ({"users": 1.5}, "--users: .*got 1.5"),
        ({"rps": -1}, "--rps"),
        ({"parameters": 0.5}, "--parameters"),
        ({"adapter": {"kind": "prompt"}}, "--kind"),
    ],
)
def test_a_wrong_demand_is_one_line_that_names_the_option(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        parse_demand(**{"model": "embedded", "parameters": None, "users": 10, "rps": 1, **values})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("text", "message"), [("currency: EUR", "cpu_core_hour"), ("- 1", "prices"), ("{", "YAML"), (None, "cannot read")])
def test_a_file_that_holds_no_prices_is_refused_in_one_line(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "prices.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_prices(path)
    assert "\n" not in str(error.value)
