"""Small generations for tests of what reads them: written straight into a store, without training."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from plora_ray.adapters.adam import AdamSteps
from plora_ray.adapters.fit import UserPrior
from plora_ray.adapters.inject import Kind
from plora_ray.adapters.labels import LabelSpace
from plora_ray.adapters.model import AdapterSpec, PersonalizedModel
from plora_ray.adapters.pretrained import weight_hash
from plora_ray.adapters.solver import UserFit
from plora_ray.config import AdapterSettings
from plora_ray.store import AdapterStore, ModelRef

DIM = 8
LABELS = LabelSpace("classification", ("no", "perhaps", "yes"))


def publish(
    store: AdapterStore, plm: str, name: str, users: list[str], seed: int = 0, kind: Kind = "plora", **adapter: Any
) -> dict[str, np.ndarray]:
    """Publish a generation with random shared parameters and random vectors for `users`; returns the vectors. adapter: more settings."""
    chosen = AdapterSettings.model_validate({"rank": 4, "user_dim": DIM, "kind": kind, **adapter})
    spec = AdapterSpec(model=plm, task="classification", outputs=3, **chosen.model_dump())
    model = PersonalizedModel.from_pretrained(spec)
    generator = torch.Generator().manual_seed(seed)
    shapes = sorted(((key, tensor.shape) for key, tensor in model.shared_parameters().items()), key=lambda pair: pair[0].endswith(".q"))
    shared = {key: torch.randn(shape, generator=generator) * 0.3 for key, shape in shapes}
    prior = UserPrior(torch.zeros(DIM, dtype=torch.float64), torch.eye(DIM, dtype=torch.float64))
    writer = store.begin(name, kind)
    writer.write_shared({**shared, **(prior.tensors() if kind == "plora" else {})}, {"format": "pt"})
    records = np.random.default_rng(seed).normal(size=(len(users), model.user_width)).astype(np.float32)
    if kind == "lora":  # a little away from the population, as fitted matrices are
        records = records * 0.1 + model.population_vector(shared).numpy()
    order = sorted(range(len(users)), key=lambda place: store.key(users[place]))
    keys = np.stack([np.frombuffer(store.key(users[place]), np.uint8) for place in order])
    writer.write_segment(0, keys, records[order], np.full(len(users), 5, np.int32))
    # A generation of the first kind names no fit, as those written before there were two solvers.
    fit = {"fit": UserFit("adam", AdamSteps(learning_rate=1e-2)).to_json()} if kind == "lora" else {}
    writer.commit(
        expected_users=len(users),
        model=ModelRef(name=plm, weight_hash=weight_hash(plm)),
        adapter_config={"spec": spec.to_json(), "labels": LABELS.to_json(), "max_length": 32, **fit},
    )
    return dict(zip(users, records, strict=True))
