"""Tiny random-weight models of every family that has defaults: shapes are real, sizes are not."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers as hf
from torch import nn

_SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 100}
_PADDED: dict[str, Any] = {**_SMALL, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

CONFIGS: dict[str, Any] = {
    "bert": hf.BertConfig(**_SMALL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    "roberta": hf.RobertaConfig(**_SMALL),
    "distilbert": hf.DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=64, vocab_size=100),
    "deberta-v2": hf.DebertaV2Config(
        **_SMALL, relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"], max_position_embeddings=64
    ),
    "modernbert": hf.ModernBertConfig(**_PADDED, cls_token_id=1, sep_token_id=2),
    "t5": hf.T5Config(d_model=32, d_kv=16, num_layers=2, num_heads=2, d_ff=64, vocab_size=100),
    "llama": hf.LlamaConfig(**_PADDED),
    "qwen2": hf.Qwen2Config(**_PADDED, num_key_value_heads=2),
    "qwen3": hf.Qwen3Config(**_PADDED, num_key_value_heads=2, head_dim=16),
}


def plm(family: str, seed: int = 0) -> nn.Module:
    """A fresh model of the family with random weights, in evaluation mode."""
    torch.manual_seed(seed)
    config = copy.deepcopy(CONFIGS[family])  # models keep and may change their configuration
    model: nn.Module = hf.T5EncoderModel(config) if family == "t5" else hf.AutoModel.from_config(config)
    if hasattr(config, "use_cache"):
        config.use_cache = False  # as load_plm does
    return model.eval()


def batch(rows: int = 5, tokens: int = 7, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Random token ids and a mask of right-padded rows of different lengths, [rows, tokens]."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 100, (rows, tokens), generator=generator)
    lengths = torch.randint(2, tokens + 1, (rows,), generator=generator)
    lengths[0] = tokens
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    return torch.where(mask.bool(), ids, 0), mask
