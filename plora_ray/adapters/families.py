"""What differs between model families: which layers get adapters by default and how tokens become one vector.

Knows Hugging Face `model_type` names and nothing else; a family that isn't listed works once the settings name
`targets` and `pooling`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from plora_ray.errors import ModelError

Pooling = Literal["mean", "first", "last"]


@dataclass(frozen=True)
class Family:
    """Defaults of one family. `targets` are suffixes of module names, matched at name boundaries as PEFT does."""

    targets: tuple[str, ...]
    pooling: Pooling
    encoder_of_seq2seq: bool = False


FAMILIES: dict[str, Family] = {
    "bert": Family(("query", "value"), "mean"),
    "roberta": Family(("query", "value"), "first"),
    "xlm-roberta": Family(("query", "value"), "first"),
    "distilbert": Family(("q_lin", "v_lin"), "first"),
    "deberta-v2": Family(("query_proj", "value_proj"), "first"),
    "modernbert": Family(("Wqkv",), "mean"),
    "t5": Family(("q", "v"), "mean", encoder_of_seq2seq=True),
    "mt5": Family(("q", "v"), "mean", encoder_of_seq2seq=True),
    "llama": Family(("q_proj", "v_proj"), "last"),
    "qwen2": Family(("q_proj", "v_proj"), "last"),
    "qwen3": Family(("q_proj", "v_proj"), "last"),
}


def family_of(model_type: str, *, targets: tuple[str, ...] | None, pooling: Pooling | None) -> Family:
    """The family's defaults with the settings' overrides laid over them.

    Raises ModelError for an unlisted family whose targets or pooling aren't given.
    """
    known = FAMILIES.get(model_type)
    if known is None and (targets is None or pooling is None):
        raise ModelError(
            f"model family '{model_type}' has no defaults: set adapter.targets and model.pooling, "
            f"or use one of {', '.join(sorted(FAMILIES))}"
        )
    base = known or Family((), "mean")
    return Family(targets or base.targets, pooling or base.pooling, base.encoder_of_seq2seq)
