"""How the engine holds a model changes nothing of what it computes: two real ranks, a tiny PLM, rows of unequal number and length."""

from __future__ import annotations

import os
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from plora_ray.adapters.blocks import checkpoint_blocks, find_blocks
from plora_ray.adapters.halves import Halves
from plora_ray.adapters.labels import LabelSpace
from plora_ray.adapters.model import AdapterSpec, PersonalizedModel
from plora_ray.adapters.objective import MutualInformation, PopulationObjective
from plora_ray.config import TrainingSettings
from plora_ray.data.table import PartitionTable
from plora_ray.training.activations import LowerActivations, whole_passes
from plora_ray.training.deepspeed_profile import read_profile
from plora_ray.training.engine import EngineOptions, ShardedTrainer
from plora_ray.training.passes import FrozenPasses
from plora_ray.training.population import PopulationStage
from plora_ray.training.rank_rows import RankRows
from plora_ray.training.user_table import UserTable
from tests.adapters import tiny

RANKS = 2
PROFILES = Path(__file__).parents[2] / "cluster" / "deepspeed"
REAL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}  # a tiny model's parameters would all stay gathered

Case = dict[str, Any]
CASES: dict[str, Case] = {
    "replicated": {"sharding": "replicated"},
    "replicated checkpointed": {"sharding": "replicated", "checkpointed": True},
    "replicated bf16": {"sharding": "replicated", "dtype": torch.bfloat16},
    "replicated with its profile": {"sharding": "replicated", "profile": "replicated.json"},
    "zero3": {"sharding": "zero3"},
    "zero3 checkpointed": {"sharding": "zero3", "checkpointed": True},
    "zero3 bf16": {"sharding": "zero3", "dtype": torch.bfloat16},
    "zero3 with its profile": {"sharding": "zero3", "profile": "zero3.json"},
    "zero3 offloaded": {"sharding": "zero3", "offload": "cpu", "profile": "zero3-offload-cpu.json", "checkpointed": True},
    "top replicated": {"sharding": "replicated", "top": True},
    "top replicated kept": {"sharding": "replicated", "top": True, "kept": (1 << 20, 0)},
    "top replicated kept checkpointed": {"sharding": "replicated", "top": True, "kept": (0, 1 << 20), "checkpointed": True},
    "top zero3 kept": {"sharding": "zero3", "top": True, "kept": (4000, 4000)},
}


def rows_of(rank: int) -> RankRows:
    """Users with equal and with own texts; the second rank has fewer of both."""
    generator = np.random.default_rng(0)
    texts = [generator.integers(3, 100, length) for length in (5, 9, 3, 12, 7, 6, 11)][: 7 - 3 * rank]
    users, rows_each = 4 - 2 * rank, len(texts)
    lengths = np.array([len(text) for _ in range(users) for text in texts])
    tokens = np.concatenate([text for _ in range(users) for text in texts]).astype(np.int32)
    rows = users * rows_each
    table = PartitionTable(
        keys=np.arange(users * 16, dtype=np.uint8).reshape(users, 16),
        user_offsets=np.arange(users + 1) * rows_each,
        tokens=tokens,
        row_offsets=np.concatenate([[0], np.cumsum(lengths)]),
        labels=np.array(["a" if (row + row // rows_each) % 2 else "b" for row in range(rows)], object),
        split=np.zeros(rows, np.int8),
        timestamps=np.zeros(rows, "datetime64[us]"),
    )
    return RankRows({0: table}, LabelSpace("classification", ("a", "b")), frozenset(), 0)


class _NoCheckpoints:
    def restore(self, *_: Any) -> tuple[int, int]:
        return 0, 0

    def save(self, *_: Any) -> None: ...


def run_case(case: Case, rank: int) -> dict[str, Any]:
    """Two epochs of the population stage, then passes of the user stage; what came out."""
    torch.manual_seed(0)
    spec = AdapterSpec("bert", "classification", 2, rank=4, user_dim=3, top_layers=1 if case.get("top") else None)
    model = PersonalizedModel(tiny.plm("bert").to(case.get("dtype", torch.float32)), spec)
    torch.manual_seed(1)
    for parameter in model.shared_parameters().values():
        nn.init.normal_(parameter, std=0.1)
    if case.get("checkpointed"):
        checkpoint_blocks(model.plm, model.context)
    halves = Halves(model.plm, 1) if "kept" in case else None
    runs = count_lower_runs(model.plm)
    objective = PopulationObjective(model, user_dropout=0.0, mutual_information=MutualInformation())
    whole = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    profile = read_profile(PROFILES / case["profile"], case.get("offload", "none")) if "profile" in case else REAL
    options = EngineOptions(case["sharding"], case.get("offload", "none"), None, profile)
    trainer = ShardedTrainer(
        objective, model.shared_parameters(), options=options, learning_rate=0.01, weight_decay=0.0, gradient_clipping=1.0, batch_rows=4
    )
    rows, settings = rows_of(rank), TrainingSettings(epochs=2, batch_rows=4, batch_tokens=64, user_dropout=0.0)
    table = UserTable(len(rows.keys), 3, learning_rate=0.01)
    losses: list[float] = []
    with ExitStack() as resources:
        below = whole_passes
        if halves is not None:
            memory, disk = case["kept"]
            kept = resources.enter_context(closing(LowerActivations(halves, trainer, rows, memory_bytes=memory, disk_bytes=disk)))
            below = kept.under
        no_checkpoints: Any = _NoCheckpoints()
        stage = PopulationStage(
            trainer, rows, table, settings, 0, no_checkpoints, lambda done: losses.append(done.loss), lambda: None, below
        )
        stage.run()
        held = trainer.parameter_bytes_held()
        shared = trainer.gathered()
        trainer.freeze()
        passes = FrozenPasses(trainer, model, rows, batch_tokens=64, batch_rows=4, below=below)
        everything = np.arange(len(rows.row_users))
        linear, _ = passes.linearise(everything, torch.full((3,), 0.1))
        trainer.load({name: tensor + 1 for name, tensor in shared.items()})  # as when vectors are counted from another mean
        moved = trainer.gathered()
        trainer.load(shared)
        owners = torch.from_numpy(rows.row_users)
        logits = passes.user_logits(everything, table.vectors, owners)
        gradients = []
        for batch in passes.in_step(list(torch.from_numpy(everything).split(4))):
            chosen = torch.zeros(0, dtype=torch.int64) if batch is None else batch
            vectors = table.vectors[owners[chosen] if len(chosen) else [0]].requires_grad_(True)
            gradient = torch.autograd.grad(passes.logits(chosen, vectors).square().sum(), vectors)[0]
            gradients += [] if batch is None else [gradient]
    dtypes = {str(parameter.dtype) for parameter in model.shared_parameters().values()}
    return {
        "losses": losses, "shared": shared, "moved": moved, "vectors": table.vectors, "jacobian": linear.jacobian, "logits": logits,
        "gradients": torch.cat(gradients), "held": held, "whole": whole, "lower_runs": runs[0],
        "texts": len(linear.logits), "dtypes": dtypes,
    }  # fmt: skip


def count_lower_runs(plm: nn.Module) -> list[int]:
    """Rows that went through the lowest block so far."""
    seen = [0]

    def hook(_module: nn.Module, inputs: tuple[Tensor, ...], _output: Any) -> None:
        seen[0] += len(inputs[0])

    linear = next(module for module in find_blocks(plm)[1][0].modules() if isinstance(module, nn.Linear))
    linear.register_forward_hook(hook)
    return seen


def run_rank(index: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update({"RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1"})
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/rendezvous", RANKS), rank=index, world_size=RANKS)
    torch.save({name: run_case(case, index) for name, case in CASES.items()}, f"{folder}/rank-{index}.pt")
    dist.barrier()
    os._exit(0)  # as in test_engine


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every case gave, by rank."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(run_rank, (str(folder),), nprocs=RANKS)  # type: ignore[no-untyped-call]
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(RANKS)]


def test_parameters_can_be_set_after_jacobians_sharded_or_not(outcomes: list[dict[str, Any]]) -> None:
    for case in (found for rank in outcomes for found in rank.values()):
        assert case["shared"].keys() == case["moved"].keys()
        for name, tensor in case["shared"].items():
            assert torch.allclose(case["moved"][name], tensor + 1, atol=1e-2), name


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("replicated", "replicated checkpointed"),
        ("replicated", "zero3"),
        ("replicated", "zero3 checkpointed"),
        ("replicated", "zero3 offloaded"),
        ("replicated", "replicated with its profile"),
        ("replicated", "zero3 with its profile"),
        ("replicated bf16", "zero3 bf16"),
        ("top replicated", "top replicated kept"),
        ("top replicated", "top replicated kept checkpointed"),
        ("top replicated", "top zero3 kept"),
    ],
)
def test_both_ways_of_holding_the_model_learn_the_same(outcomes: list[dict[str, Any]], one: str, other: str) -> None:
    tolerance = 2e-2 if "bf16" in one else 2e-4
    for ranks in outcomes:
        first, second = ranks[one], ranks[other]
        assert first["losses"] and np.allclose(first["losses"], second["losses"], atol=tolerance)
        for name, tensor in first["shared"].items():
            assert torch.allclose(tensor, second["shared"][name], atol=tolerance), name
        for name in ("vectors", "jacobian", "logits", "gradients"):
            assert torch.allclose(first[name], second[name], atol=tolerance), name


def test_adapters_stay_fp32_and_learn_beside_bf16_weights(outcomes: list[dict[str, Any]]) -> None:
    for name in ("replicated bf16", "zero3 bf16"):
        found = outcomes[0][name]
        assert found["dtypes"] == {"torch.float32"}
        assert found["whole"] < 0.6 * outcomes[0]["replicated"]["whole"]
        assert np.allclose(found["losses"], outcomes[0]["replicated"]["losses"], atol=0.02) and found["losses"][-1] < found["losses"][0]


def test_each_rank_holds_its_part_of_a_sharded_model_between_passes(outcomes: list[dict[str, Any]]) -> None:
    for ranks in outcomes:
        assert ranks["replicated"]["held"] == ranks["replicated"]["whole"]
        assert ranks["zero3"]["whole"] / RANKS <= ranks["zero3"]["held"] <= 1.05 * ranks["zero3"]["whole"] / RANKS


def test_kept_activations_run_the_lower_blocks_once_a_text_over_epochs_users_and_stages(outcomes: list[dict[str, Any]]) -> None:
    for ranks in outcomes:
        assert ranks["top replicated kept"]["lower_runs"] == ranks["top replicated kept"]["texts"]
        assert ranks["top replicated kept checkpointed"]["lower_runs"] == ranks["top replicated kept checkpointed"]["texts"]
        assert ranks["top replicated"]["lower_runs"] > 3 * ranks["top replicated"]["texts"]
