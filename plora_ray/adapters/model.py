"""A frozen PLM, adapted layers in it, pooling and a task head: token ids and users' vectors in, logits out.

Knows nothing of users' names, data files, optimisers or storage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plora_ray.adapters.blocks import in_top_blocks
from plora_ray.adapters.context import UserContext, cut_matrices
from plora_ray.adapters.families import Pooling, family_of
from plora_ray.adapters.head import TaskHead, UserTerms, leanings_of
from plora_ray.adapters.inject import AdaptedLinear, Kind, find_targets, fold, inject
from plora_ray.adapters.layers import PLoRALinear
from plora_ray.adapters.pretrained import hidden_size, load_plm
from plora_ray.errors import ModelError

Task = Literal["classification", "regression"]


@dataclass(frozen=True)
class AdapterSpec:
    """Everything that fixes the shapes of a personalised model; kept with every generation so that it can be rebuilt.

    outputs: classes of a classification, 1 for a regression. targets / pooling None: the family's defaults.
    kind: plora, a vector of user_dim numbers a user; lora, private matrices a user (user_dim means nothing then).
    top_layers: how many blocks, counted from the top, have adapters; None: all.
    head_terms: what of the user the task head hears (kind plora); see TaskHead.
    """

    model: str
    task: Task
    outputs: int
    rank: int = 16
    alpha: float = 32.0
    user_dim: int = 64
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None
    pooling: Pooling | None = None
    kind: Kind = "plora"
    top_layers: int | None = None
    head_terms: UserTerms = "none"

    @property
    def leanings(self) -> int:
        """How many of a vector's last numbers are its user's leanings; see TaskHead."""
        return 0 if self.head_terms == "none" else leanings_of(self.outputs, self.user_dim)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> AdapterSpec:
        """The spec that `to_json` gave; what an older one doesn't name is as it was then: kind plora, a head that hears no user."""
        targets = values.get("targets")
        return cls(**{**values, "targets": tuple(targets) if targets is not None else None})


def pool(hidden: Tensor, attention_mask: Tensor, how: Pooling) -> Tensor:
    """One vector [batch, hidden] a row from hidden states [batch, tokens, hidden]; padding (mask 0) never counts.

    `last` finds the last real token under left and right padding alike; `first` the first.
    """
    mask = attention_mask.to(hidden.dtype)
    if how == "mean":
        return (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
    positions = torch.arange(hidden.shape[1], device=hidden.device)
    real = attention_mask.bool()
    index = torch.where(real, positions, -1).amax(1) if how == "last" else torch.where(real, positions, hidden.shape[1]).amin(1)
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), index.clamp(0, hidden.shape[1] - 1)]


class PersonalizedModel(nn.Module):
    """PLM with adapted layers, pooling and head. In the training form until `fold()`, in the serving form after it.

    A user is one flat vector [user_width]. A batch is as many blocks of equally many adjacent rows as it has users.

    plm: maps input_ids [batch, tokens] to last_hidden_state [batch, tokens, hidden]; its parameters are frozen here.
    """

    def __init__(self, plm: nn.Module, spec: AdapterSpec) -> None:
        super().__init__()
        config: Any = plm.config
        self.family = family_of(config.model_type, targets=spec.targets, pooling=spec.pooling)
        self.spec = spec
        self.context = UserContext()
        self.plm = plm.requires_grad_(False)
        names = find_targets(plm, self.family.targets)
        if spec.top_layers is not None:
            names = in_top_blocks(plm, names, spec.top_layers)
        self._layers: dict[str, AdaptedLinear] = inject(
            plm, names, kind=spec.kind, rank=spec.rank, alpha=spec.alpha, user_dim=spec.user_dim, dropout=spec.dropout, context=self.context
        )
        if spec.kind == "lora":
            bases = {name: layer.base for name, layer in self._layers.items()}
            self.context.shapes = {name: (spec.rank, base.in_features, base.out_features) for name, base in bases.items()}
        self.head = TaskHead(hidden_size(plm), spec.outputs, terms=spec.head_terms, rank=spec.rank, user_dim=spec.user_dim)
        self.head_dropout = nn.Dropout(spec.dropout)
        self.folded = False
        self.register_buffer("user_maps", None)  # of the folded layers, by name in `_outs`, one above the other: [sum of outs, user_dim]
        self.user_maps: Tensor | None
        self._outs: dict[str, int] = {}

    @classmethod
    def from_pretrained(cls, spec: AdapterSpec, *, dtype: torch.dtype = torch.float32) -> PersonalizedModel:
        """Load the PLM that `spec.model` names and put fresh adapters in. Raises ModelError."""
        return cls(load_plm(spec.model, dtype=dtype), spec)

    @property
    def user_width(self) -> int:
        """Numbers in a user's vector: user_dim, or for private matrices the sum of rank * (in + out) over the layers."""
        if self.spec.kind == "lora":
            return sum(rank * (inner + outer) for rank, inner, outer in self.context.shapes.values())
        return self.spec.user_dim

    def population_vector(self, shared: Mapping[str, Tensor] | None = None) -> Tensor:
        """The vector [user_width], float32, that makes a row a population row: zeros, or the population's matrices.

        shared: `layers.{name}.A|B` to take instead of the model's own, which may be sharded.
        """
        if self.spec.kind == "plora":
            return torch.zeros(self.spec.user_dim, device=self.head.weight.device)
        parts: list[Tensor] = []
        for name in self.context.shapes:
            layer = self.plm.get_submodule(name)
            parts += [getattr(layer, part) if shared is None else shared[f"layers.{name}.{part}"] for part in ("A", "B")]
        return torch.cat([part.detach().float().flatten() for part in parts])

    def user_matrices(self, vector: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """A [rank, in] and B [out, rank] of every layer in a vector [user_width] of the kind `lora`."""
        return {name: (a[0], b[0]) for name, (a, b) in cut_matrices(vector.unsqueeze(0), self.context.shapes).items()}

    def train(self, mode: bool = True) -> PersonalizedModel:
        """Training mode reaches the adapters' and the head's dropout; the frozen PLM always runs as it does when serving."""
        super().train(mode)
        self.plm.eval()
        for layer in self._layers.values():
            layer.dropout.train(mode)
        return self

    def represent(self, input_ids: Tensor, attention_mask: Tensor, user_vectors: Tensor | None = None) -> Tensor:
        """Pooled text representations [batch, hidden]. user_vectors: [users, user_width], or None for the population.

        Raises ModelError unless batch is a multiple of users; the rows of a user are adjacent.
        """
        if user_vectors is not None and self.spec.kind == "lora":
            user_vectors = user_vectors.to(next(self.plm.parameters()).dtype)  # once, and not every layer's matrices by themselves
        self.context.enter(user_vectors, len(input_ids))
        try:
            if self.user_maps is not None and user_vectors is not None:
                terms = F.linear(user_vectors.to(self.user_maps.dtype), self.user_maps)
                self.context.terms = dict(zip(self._outs, torch.split(terms, list(self._outs.values()), dim=1), strict=True))
            hidden = self.plm(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        finally:
            self.context.leave()
        return pool(hidden, attention_mask, self.family.pooling)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, user_vectors: Tensor | None = None) -> Tensor:
        """Logits [batch, outputs], fp32. input_ids, attention_mask: [batch, tokens] int64."""
        return self.classify(self.represent(input_ids, attention_mask, user_vectors), user_vectors)

    def classify(self, representation: Tensor, user_vectors: Tensor | None = None) -> Tensor:
        """Logits [batch, outputs], fp32, of representations [batch, hidden] of the users' texts, as `represent` gives them."""
        return self.head(self.head_dropout(representation.to(self.head.weight.dtype)), user_vectors).float()

    def shared_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters all users share and training learns: `layers.{name}.A|B` (and `P|q`), `head.weight|bias` and the head's terms."""
        if self.folded:
            raise ModelError("a folded model has no separate shared parameters any more: load the generation again")
        shared = {f"layers.{name}.{part}": getattr(layer, part) for name, layer in self._layers.items() for part in layer.shared}
        return {**shared, **{f"head.{name}": parameter for name, parameter in self.head.named_parameters()}}

    def completed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Shared tensors with what generations from before there was a q don't have: zeros."""
        missing = {f"layers.{name}.q": torch.zeros(self.spec.rank) for name, layer in self._layers.items() if "q" in layer.shared}
        return {**missing, **tensors}

    def load_shared(self, tensors: dict[str, Tensor]) -> None:
        """Copy shared tensors in; names and shapes must be exactly those of `shared_parameters`. Raises ModelError."""
        parameters, tensors = self.shared_parameters(), self.completed(tensors)
        if missing := sorted(set(parameters) ^ set(tensors)):
            raise ModelError(f"shared parameters don't fit this model: {missing[0]} (and {len(missing) - 1} more) on one side only")
        with torch.no_grad():
            for name, parameter in parameters.items():
                if parameter.shape != tensors[name].shape:
                    raise ModelError(f"shared parameter {name} has shape {tuple(tensors[name].shape)}, expected {tuple(parameter.shape)}")
                parameter.copy_(tensors[name])

    def fold(self) -> PersonalizedModel:
        """Turn into the serving form, in place, and return self.

        plora: W' = W + s B A, the user terms of all layers as one product. lora: W stays, and every row's low-rank term is its own
        user's, as one batched product a layer: with W + s B A a personal row would first have to take the population's off.
        """
        if not self.folded:
            foldable = {name: layer for name, layer in self._layers.items() if isinstance(layer, PLoRALinear)}
            if foldable:
                self.user_maps = torch.cat([layer.user_map() for layer in foldable.values()])
                self._outs = {name: layer.base.out_features for name, layer in foldable.items()}
            fold(self.plm, self._layers)
            self._layers = {}
            self.folded = True
        return self.requires_grad_(False).eval()
