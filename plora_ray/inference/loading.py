"""From a generation in the store to a serving model in memory, checked to be the model it was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from plora_ray.adapters.fit import UserPrior
from plora_ray.adapters.labels import LabelSpace
from plora_ray.adapters.model import AdapterSpec, PersonalizedModel
from plora_ray.adapters.pretrained import load_tokenizer, weight_hash
from plora_ray.adapters.solver import UserFit
from plora_ray.errors import ModelError
from plora_ray.store import AdapterStore, UserAdapter, new_version
from plora_ray.store.adapters import now_iso
from plora_ray.store.reader import GenerationReader


@dataclass(frozen=True)
class LoadedGeneration:
    """Everything a process needs to answer with one generation. `reader` finds the users' own adapters in the store.

    fit: how its users were fitted, and how new ones are. prior: of user vectors; None for private matrices, which have none.

    The model holds the user vectors of the pass it is in, so one thread at a time may run it: give an engine or a fitter a
    generation of its own.
    """

    store: AdapterStore
    reader: GenerationReader
    model: PersonalizedModel
    tokenizer: PreTrainedTokenizerBase
    labels: LabelSpace
    fit: UserFit
    prior: UserPrior | None
    max_length: int

    @property
    def name(self) -> str:
        """The generation's id."""
        return self.reader.generation

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return next(self.model.parameters()).device

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, cut to max_length; at least one token each, as in training."""
        if not texts:
            return []
        encoded = self.tokenizer(
            list(texts), truncation=True, max_length=self.max_length, return_attention_mask=False, return_token_type_ids=False
        )["input_ids"]
        return [ids or [self.tokenizer.pad_token_id or 0] for ids in encoded]

    def put_fresh(self, key: bytes, record: np.ndarray, examples: int, erased: str | None) -> UserAdapter:
        """Store a record float32 [width], fitted with this generation's shared weights on `examples` rows, as the user's fresh adapter.

        erased: version of the user's last erasure that was known when the fit began, if any. Raises as `AdapterStore.put_fresh`.
        """
        adapter = UserAdapter(
            key=key, record=record, examples=examples, generation=self.name, version=new_version(after=erased), updated_at=now_iso(),
            source="fresh", basis=self.reader.basis,
        )  # fmt: skip
        self.store.put_fresh(adapter, known_erasure=erased or "")
        return adapter


def load_generation(
    store: AdapterStore, generation: str | None = None, *, dtype: torch.dtype = torch.float32, fold: bool = True, device: str = "cpu"
) -> LoadedGeneration:
    """Open a generation (the current one by default) and build its model on `device`, folded for serving.

    Raises StoreError if there is none, ModelError if the PLM here isn't the one the adapters were trained on.
    """
    reader = store.open_generation(generation)
    config: dict[str, Any] = reader.manifest.adapter_config
    spec = AdapterSpec.from_json(config["spec"])
    found, expected = weight_hash(spec.model), reader.manifest.model.weight_hash
    if found != expected:
        raise ModelError(
            f"generation {reader.generation} was trained on other weights of model '{spec.model}' "
            f"(SHA-256 {expected[:12]}..., here {found[:12]}...): install those weights or train again"
        )
    model = PersonalizedModel.from_pretrained(spec, dtype=dtype)
    tensors = reader.shared().tensors
    model.load_shared({name: tensor for name, tensor in tensors.items() if not name.startswith("prior.")})
    return LoadedGeneration(
        store=store,
        reader=reader,
        model=(model.fold() if fold else model.eval()).to(device),
        tokenizer=load_tokenizer(spec.model),
        labels=LabelSpace.from_json(config["labels"]),
        fit=UserFit.from_json(config.get("fit")),
        prior=UserPrior.from_tensors(tensors) if spec.kind == "plora" else None,
        max_length=int(config["max_length"]),
    )
