"""The other side of the training figures: PEFT's LoRA on the same PLM, one adapter for everybody, torch's AdamW."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from plora_ray.adapters.families import family_of
from plora_ray.adapters.model import pool
from plora_ray.adapters.pretrained import hidden_size, load_plm


class PeftLora:
    """Mean-pooled classifier over a frozen PLM with LoRA in its query and value layers; `step` is one optimisation step.

    Like ours, the frozen PLM runs without its own dropout and gradients are clipped to norm 1.
    """

    def __init__(self, model: str, *, outputs: int, rank: int, alpha: float, learning_rate: float = 1e-3, device: str = "cpu") -> None:
        plm: Any = load_plm(model)
        targets = family_of(plm.config.model_type, targets=None, pooling=None).targets
        config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=list(targets))
        self._plm = get_peft_model(plm, config).eval().to(device)
        self._head = nn.Linear(hidden_size(plm), outputs, device=device)
        self._trained = [parameter for parameter in self._plm.parameters() if parameter.requires_grad] + list(self._head.parameters())
        self._optimizer = torch.optim.AdamW(self._trained, lr=learning_rate, weight_decay=0.01)

    def step(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """One step on a batch [batch, tokens]; the loss."""
        self._optimizer.zero_grad(set_to_none=True)
        hidden = self._plm(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        loss = F.cross_entropy(self._head(pool(hidden, attention_mask, "mean")), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(self._trained, 1.0)
        self._optimizer.step()
        return loss.detach()
