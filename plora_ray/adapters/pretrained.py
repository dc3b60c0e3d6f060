"""Finding and loading the frozen pre-trained language model (PLM) and its tokenizer.

A model is named by a local directory, by an installed Python package that carries one, or by a Hugging Face hub name.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerBase, T5EncoderModel
from transformers.models.mt5 import MT5EncoderModel
from transformers.utils import logging as hf_logging

from plora_ray.adapters.families import FAMILIES
from plora_ray.errors import ModelError

WEIGHT_PATTERNS = ("*.safetensors", "*.bin")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # as the settings call them
HUB_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]
_SEQ2SEQ_ENCODERS: dict[str, Any] = {"t5": T5EncoderModel, "mt5": MT5EncoderModel}


def resolve_model(name: str) -> str:
    """The local directory of a model named by a directory, an installed package or a hub name (which is downloaded once).

    Raises ModelError if it is none of the three.
    """
    path = Path(name).expanduser()
    if (path / "config.json").is_file():
        return str(path.resolve())
    if path.is_dir():
        raise ModelError(f"model directory {name} holds no config.json: point model.name at a directory written by save_pretrained")
    return _in_package(name) or _from_hub(name)


def _in_package(name: str) -> str | None:
    """The model directory inside the installed package of that name, if there is one."""
    module = name.replace("-", "_")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    for root in (spec.submodule_search_locations or []) if spec else []:
        for candidate in (Path(root) / "model", Path(root)):
            if (candidate / "config.json").is_file():
                return str(candidate)
    return None


@lru_cache(maxsize=8)
def _from_hub(name: str) -> str:
    """The model's snapshot in the local Hugging Face cache, fetched if it isn't there; safetensors where there are any."""
    try:
        for patterns in (HUB_FILES, [*HUB_FILES, "*.bin"]):
            location = Path(snapshot_download(name, allow_patterns=patterns))
            if _weight_files(location):
                return str(location)
    except Exception as error:  # the hub client's errors have no common base
        raise ModelError(_not_loadable(name, "files", error)) from error
    raise ModelError(f"hub model '{name}' has no weight files ({' or '.join(WEIGHT_PATTERNS)})")


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer; a decoder without a padding token pads with its end-of-text token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(name))
    except (OSError, ValueError) as error:
        raise ModelError(_not_loadable(name, "tokenizer", error)) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_plm(name: str, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The bare model that maps token ids to hidden states [batch, tokens, hidden], frozen, without task head or pooler.

    Raises ModelError if the name is neither a directory, a package nor a reachable hub model.
    """
    location = resolve_model(name)
    try:
        config = AutoConfig.from_pretrained(location)
        kind: Any = _SEQ2SEQ_ENCODERS.get(config.model_type, AutoModel)
        with _quiet():
            model = kind.from_pretrained(location, dtype=dtype, **_without_pooler(config))
    except (OSError, ValueError) as error:
        raise ModelError(_not_loadable(name, "model", error)) from error
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    return model.requires_grad_(False).eval()


def plm_skeleton(name: str, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model that `load_plm` gives, on the meta device: shapes without weights, for counting."""
    config = AutoConfig.from_pretrained(resolve_model(name))
    kind = _SEQ2SEQ_ENCODERS.get(config.model_type)
    with torch.device("meta"), _quiet():
        model: nn.Module = AutoModel.from_config(config, dtype=dtype, **_without_pooler(config)) if kind is None else kind(config).to(dtype)
    return model


def _without_pooler(config: Any) -> dict[str, bool]:
    """The option that leaves out a head nobody uses, for the families that have one."""
    return {"add_pooling_layer": False} if config.model_type in ("bert", "roberta", "xlm-roberta") else {}


def weight_hash(name: str) -> str:
    """SHA-256 (hex) over the model's weight files, in name order: adapters fit exactly these weights."""
    location = Path(resolve_model(name))
    files = _weight_files(location)
    if not files:
        raise ModelError(f"model directory {location} holds no weight files ({' or '.join(WEIGHT_PATTERNS)})")
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def _weight_files(location: Path) -> list[Path]:
    """The weight files that transformers would load: safetensors if there are any."""
    return next((found for pattern in WEIGHT_PATTERNS if (found := sorted(location.glob(pattern)))), [])


def hidden_size(plm: nn.Module) -> int:
    """Width of the model's hidden states."""
    config: Any = plm.config
    return int(getattr(config, "hidden_size", None) or config.d_model)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own bars and its report of the heads that this system leaves out on purpose."""
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def _not_loadable(name: str, part: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"cannot load the {part} of model '{name}': it is no local directory, no installed package and no reachable hub model "
        f"({reason if len(reason) <= 200 else reason[:200].rsplit(' ', 1)[0] + ' ...'}); supported families: {', '.join(sorted(FAMILIES))}"
    )
