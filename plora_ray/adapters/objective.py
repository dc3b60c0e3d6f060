"""What the population stage minimises: the task loss with personalised dropout, plus the paper's mutual-information terms.

One module so that a sharding engine sees one forward call a step. Knows no optimiser and no data source.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plora_ray.adapters.model import PersonalizedModel, Task


@dataclass(frozen=True)
class MutualInformation:
    """Settings of mutual-information maximisation (arXiv 2403.06208, as in the released trainer).

    weight: lambda, 0 turns both terms off. layer_term: MSE between adapter outputs with and without the user.
    logit_term: KL of user against population predictions at `temperature`; detach_population: stop its gradient
    before the head.
    """

    weight: float = 0.0
    temperature: float = 4.0
    layer_term: bool = True
    logit_term: bool = True
    detach_population: bool = True


def task_losses(logits: Tensor, labels: Tensor, task: Task) -> Tensor:
    """Loss of every row [batch]: cross-entropy for class indices, half squared error for values."""
    if task == "regression":
        return 0.5 * (logits.squeeze(-1) - labels.to(logits.dtype)).square()
    return F.cross_entropy(logits, labels, reduction="none")


def logit_divergence(logits_user: Tensor, logits_population: Tensor, temperature: float) -> Tensor:
    """KL(softmax(z_user / tau) || softmax(z_population / tau)), mean over the batch. Logits: [batch, classes]."""
    log_user = F.log_softmax(logits_user / temperature, dim=-1)
    log_population = F.log_softmax(logits_population / temperature, dim=-1)
    return F.kl_div(log_population, log_user, reduction="batchmean", log_target=True)


class PopulationObjective(nn.Module):
    """Weighted mean loss of a mixed-user batch.

    user_dropout: rho, the chance that a row trains the population path (its user vector becomes zero).
    """

    def __init__(self, model: PersonalizedModel, *, user_dropout: float, mutual_information: MutualInformation) -> None:
        super().__init__()
        self.model = model
        self.user_dropout = user_dropout
        self.mutual_information = mutual_information

    def forward(self, input_ids: Tensor, attention_mask: Tensor, user_vectors: Tensor | None, labels: Tensor, weights: Tensor) -> Tensor:
        """Scalar loss. user_vectors: [batch, d], or None to train the population alone; labels: [batch]; weights: [batch], 0 for
        rows that only keep ranks in step."""
        kept = None if user_vectors is None else self._drop_users(user_vectors)
        information = self.mutual_information
        wanted = information.weight > 0 and self.training
        context = self.model.context
        context.record_effects = wanted and information.layer_term
        representation = self.model.represent(input_ids, attention_mask, kept)
        effects, context.effects, context.record_effects = context.effects, {}, False
        logits = self.model.classify(representation, kept)
        mass = weights.sum().clamp(min=1.0)
        loss = (task_losses(logits, labels, self.model.spec.task) * weights).sum() / mass
        counts = float(weights.sum() > 0)  # a pass that only keeps ranks in step teaches nothing
        if wanted and information.layer_term:
            layer_mse = torch.stack([effect.float().square().mean() for effect in effects.values()]).mean()
            loss = loss + counts * information.weight * layer_mse
        if wanted and information.logit_term and self.model.spec.task == "classification":
            loss = loss + counts * information.weight * self._divergence(input_ids, attention_mask, logits)
        return loss

    def _drop_users(self, vectors: Tensor) -> Tensor:
        """Personalised dropout: every row keeps its p_u with probability 1 - rho, else it is a population row."""
        if not self.training or self.user_dropout == 0:
            return vectors
        keep = torch.rand(vectors.shape[0], 1, device=vectors.device) >= self.user_dropout
        return vectors * keep.to(vectors.dtype)

    def _divergence(self, input_ids: Tensor, attention_mask: Tensor, logits: Tensor) -> Tensor:
        population = self.model.represent(input_ids, attention_mask, None)
        if self.mutual_information.detach_population:
            population = population.detach()
        return logit_divergence(logits, self.model.classify(population), self.mutual_information.temperature)
