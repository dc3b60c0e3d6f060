"""The usual way to give every user a model: PEFT, one user after the other, each a LoRA of its own from the population's."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.population import MODEL, Population, UserRows
from plora_ray.adapters.model import pool
from plora_ray.adapters.pretrained import load_plm

BATCH_ROWS = 8


class OneByOne:
    """Fits a user's LoRA by AdamW, the head frozen; `reset` puts the population's matrices back without building anything anew."""

    def __init__(self, population: Population, *, learning_rate: float) -> None:
        spec, shared, device = population.model.spec, population.model.shared_parameters(), population.trainer.device
        config = LoraConfig(r=spec.rank, lora_alpha=int(spec.alpha), target_modules=["query", "value"], lora_dropout=0.0)
        self.model: nn.Module = get_peft_model(load_plm(MODEL), config).to(device)
        self.head = nn.Linear(*reversed(population.model.head.weight.shape)).requires_grad_(False)
        self.device = device
        self.head.to(device).load_state_dict({name: getattr(population.model.head, name).detach() for name in ("weight", "bias")})
        self.classes = {name: place for place, name in enumerate(population.labels.classes)}
        self.learning_rate = learning_rate
        self.matrices = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        self.start = {name: shared[_ours(name)].detach().clone() for name in self.matrices}
        self.reset()

    def reset(self) -> None:
        """Back to the population, with a new optimiser and the first shuffle."""
        with torch.no_grad():
            for name, value in self.matrices.items():
                value.copy_(self.start[name])
        self.optimizer = torch.optim.AdamW(self.matrices.values(), lr=self.learning_rate)
        self.generator = torch.Generator().manual_seed(0)

    def fit(self, user: UserRows, epochs: int) -> None:
        """`epochs` more passes over the user's rows, shuffled, in batches of BATCH_ROWS padded to their longest."""
        for _ in range(epochs):
            for places in torch.randperm(len(user.ids), generator=self.generator).split(BATCH_ROWS):
                self.optimizer.zero_grad()
                chosen = user.take(places.tolist())
                F.cross_entropy(self.logits(chosen), self._labels(chosen)).backward()
                self.optimizer.step()

    @torch.no_grad()
    def nll(self, user: UserRows) -> Tensor:
        """Negative log likelihood of each of the user's rows."""
        return F.cross_entropy(self.logits(user), self._labels(user), reduction="none")

    def logits(self, user: UserRows) -> Tensor:
        """[rows, classes]."""
        longest = max(map(len, user.ids))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in user.ids], device=self.device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in user.ids], device=self.device)
        hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        logits: Tensor = self.head(pool(hidden, mask, "mean"))
        return logits

    def _labels(self, user: UserRows) -> Tensor:
        return torch.tensor([self.classes[label] for label in user.labels], device=self.device)


def _ours(name: str) -> str:
    """The shared parameter that PEFT's parameter starts from."""
    layer, _, part = name.removeprefix("base_model.model.").partition(".lora_")
    return f"layers.{layer}.{part[0]}"
