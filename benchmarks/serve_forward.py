"""One batch, and rows of real lengths: the engine beside the plain encoder and beside PEFT's mixed-adapter batches."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.figures import Figure, speed_ratio
from benchmarks.made_generation import MAX_LENGTH, MODEL, name_of, publish, spec_of
from plora_ray.adapters.inject import Kind
from plora_ray.adapters.model import PersonalizedModel, pool
from plora_ray.adapters.pretrained import hidden_size, load_plm, load_tokenizer
from plora_ray.inference import InferenceEngine, load_generation
from plora_ray.store import AdapterStore

ROWS, TOKENS = 32, 64
PEFT_RANK, PEFT_USERS = 8, 32


@torch.inference_mode()
def engine_vs_plain_encoder(
    kind: Kind, *, rounds: int, model: str = MODEL, rows: int = ROWS, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Figure:
    """A batch of so many different users through the serving form against the plain encoder with the same head and pooling."""
    personal = PersonalizedModel.from_pretrained(replace(spec_of(kind), model=model), dtype=dtype)
    for parameter in personal.shared_parameters().values():
        torch.nn.init.normal_(parameter, std=0.02)
    users = (personal.population_vector().cpu() + torch.randn(rows, personal.user_width) * 0.02).to(device)
    folded, plain = personal.fold().to(device), load_plm(model, dtype=dtype).to(device)
    head = torch.nn.Linear(hidden_size(plain), 2, dtype=dtype, device=device)
    ids = torch.randint(1000, 20_000, (rows, TOKENS), device=device)
    mask = torch.ones_like(ids)

    def without_users() -> Tensor:
        logits: Tensor = head(pool(plain(input_ids=ids, attention_mask=mask).last_hidden_state, mask, "mean"))
        return logits.cpu()

    name, goal = ("engine_vs_plain_encoder", 0.97) if kind == "plora" else ("engine_vs_plain_encoder_lora_kind", 0.85)
    name += "" if rows == ROWS else f"_{rows}_rows"
    return speed_ratio(name, lambda: folded(ids, mask, users).cpu(), without_users, rounds=rounds, goal=goal)


class PeftMixed:
    """One LoRA a user in one PEFT model, batches in the order of arrival, each row's adapter named: as PEFT documents it."""

    def __init__(self, users: list[str], device: str, dtype: torch.dtype) -> None:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=PEFT_RANK, lora_alpha=2 * PEFT_RANK, target_modules=["query", "value"], init_lora_weights=False)
        self._device = device
        self._model: Any = get_peft_model(load_plm(MODEL, dtype=dtype), config, adapter_name=users[0])
        for user in users[1:]:
            self._model.add_adapter(user, config)
        self._model.eval().to(device=device, dtype=dtype)
        self._head, self._tokenizer = torch.nn.Linear(384, 2, dtype=dtype, device=device), load_tokenizer(MODEL)

    @torch.inference_mode()
    def predict(self, rows: list[tuple[str, str]]) -> list[list[float]]:
        """Probabilities of each row."""
        found: list[list[float]] = []
        for start in range(0, len(rows), ROWS):
            batch = rows[start : start + ROWS]
            texts = [text for _, text in batch]
            tokens = self._tokenizer(texts, truncation=True, max_length=MAX_LENGTH, padding=True, return_tensors="pt").to(self._device)
            hidden = self._model(**tokens, adapter_names=[user for user, _ in batch]).last_hidden_state
            found += torch.softmax(self._head(pool(hidden, tokens["attention_mask"], "mean")), -1).tolist()
        return found


def engine_vs_peft_adapter_names(
    kind: Kind, texts: list[str], *, rounds: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Figure:
    """Texts of PEFT_USERS users in turn, tokenised by both sides: seconds of PEFT's `adapter_names` / the engine's."""
    rows = [(name_of(place % PEFT_USERS), text) for place, text in enumerate(texts)]
    with tempfile.TemporaryDirectory(prefix="plora-serve-") as folder:
        store = AdapterStore(folder)
        publish(store, PEFT_USERS, kind)
        engine = InferenceEngine(load_generation(store, dtype=dtype, device=device), batch_rows=ROWS, resident="on")
        peft = PeftMixed(list(dict.fromkeys(user for user, _ in rows)), device, dtype)
        name = "engine_vs_peft_adapter_names" + ("_lora_kind" if kind == "lora" else "")
        figure = speed_ratio(name, lambda: engine.predict(rows), lambda: peft.predict(rows), rounds=rounds, goal=3.0)
        engine.close()
    return figure
