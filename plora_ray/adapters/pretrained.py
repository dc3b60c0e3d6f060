"""Finding and loading the frozen pre-trained language model (PLM) and its tokenizer.

A model is named by a local directory, by an installed Python package that carries one, or by a Hugging Face hub name.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerBase, T5EncoderModel
from transformers.models.mt5 import MT5EncoderModel
from transformers.utils import logging as hf_logging

from plora_ray.adapters.families import FAMILIES
from plora_ray.errors import ModelError

WEIGHT_PATTERNS = ("*.safetensors", "*.bin")
_SEQ2SEQ_ENCODERS: dict[str, Any] = {"t5": T5EncoderModel, "mt5": MT5EncoderModel}


def resolve_model(name: str) -> str:
    """A directory or hub name that transformers can load, for a directory, an installed package or a hub name."""
    path = Path(name).expanduser()
    if (path / "config.json").is_file():
        return str(path.resolve())
    if path.is_dir():
        raise ModelError(f"model directory {name} holds no config.json: point model.name at a directory written by save_pretrained")
    module = name.replace("-", "_")
    if module.isidentifier():
        spec = importlib.util.find_spec(module)
        for root in (spec.submodule_search_locations or []) if spec else []:
            for candidate in (Path(root) / "model", Path(root)):
                if (candidate / "config.json").is_file():
                    return str(candidate)
    return name


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
        options: dict[str, Any] = {"dtype": dtype}
        if config.model_type in ("bert", "roberta", "xlm-roberta"):
            options["add_pooling_layer"] = False
        with _quiet():
            model = kind.from_pretrained(location, **options)
    except (OSError, ValueError) as error:
        raise ModelError(_not_loadable(name, "model", error)) from error
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    return model.requires_grad_(False).eval()


def weight_hash(name: str) -> str:
    """SHA-256 (hex) over the weight files of a local model, in name order: adapters fit exactly these weights.

    A hub model is found in the local cache it was loaded from.
    """
    location = Path(resolve_model(name))
    if not location.is_dir():
        from huggingface_hub import snapshot_download

        try:
            location = Path(snapshot_download(name, local_files_only=True))
        except (OSError, ValueError) as error:
            raise ModelError(_not_loadable(name, "weights", error)) from error
    for pattern in WEIGHT_PATTERNS:
        files = sorted(location.glob(pattern))
        if files:
            digest = hashlib.sha256()
            for file in files:
                with file.open("rb") as stream:
                    while chunk := stream.read(1 << 22):
                        digest.update(chunk)
            return digest.hexdigest()
    raise ModelError(f"model directory {location} holds no weight files ({' or '.join(WEIGHT_PATTERNS)})")


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
        f"({reason[:200]}); supported families: {', '.join(sorted(FAMILIES))}"
    )
