"""The peer of the serving figures: Ray Serve with `serve.multiplexed` over one PEFT model, as its documentation leads one to write it.

    python -m benchmarks.multiplexed_peft FOLDER PORT

FOLDER/{user id} holds a user's PEFT checkpoint. A request is POST / with {"user_id", "text"}; the user id goes to Serve in the
header `serve_multiplexed_model_id`. At most 64 users' adapters are loaded. Runs until SIGTERM.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from plora_ray.runtime import private_cluster_environment

os.environ.update(private_cluster_environment())  # Ray reads it when it is imported

import ray
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from ray import serve
from starlette.requests import Request

from benchmarks.made_generation import MAX_LENGTH, MODEL
from plora_ray.adapters.model import pool
from plora_ray.adapters.pretrained import load_plm, load_tokenizer

RESIDENT = 64
RANK = 8


def write_adapters(folder: Path, users: list[str]) -> None:
    """A PEFT checkpoint with random matrices for every user."""
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["query", "value"], init_lora_weights=False)
    model: Any = get_peft_model(load_plm(MODEL), config)
    for user in users:
        model.save_pretrained(folder / user)


class Adapter:
    """A loaded user; Serve drops it when another one needs its place."""

    def __init__(self, model: PeftModel, name: str, alone: threading.RLock) -> None:
        self.model, self.name, self.alone = model, name, alone

    def __del__(self) -> None:
        with self.alone:  # Serve calls this in a thread of its own
            self.model.delete_adapter(self.name)


@serve.deployment(max_ongoing_requests=256, ray_actor_options={"num_cpus": 1})
class Multiplexed:
    """One replica: PEFT's adapters swapped in and out, batches of one user's texts."""

    def __init__(self, folder: str) -> None:
        torch.set_num_threads(1)
        self._folder, self._loads = Path(folder), itertools.count()
        self._alone = threading.RLock()
        first = next(self._folder.iterdir())
        self._model: Any = PeftModel.from_pretrained(load_plm(MODEL), str(first), adapter_name="first").eval()
        self._head, self._tokenizer = torch.nn.Linear(384, 2), load_tokenizer(MODEL)

    @serve.multiplexed(max_num_models_per_replica=RESIDENT)
    async def adapter(self, user: str) -> Adapter:
        name = f"{user}-{next(self._loads)}"  # the same user's last one may still answer while it is dropped
        with self._alone:
            self._model.load_adapter(str(self._folder / user), adapter_name=name)
        return Adapter(self._model, name, self._alone)

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.002)
    async def predict(self, texts: list[str]) -> list[list[float]]:
        adapter = await self.adapter(serve.get_multiplexed_model_id())
        with self._alone, torch.inference_mode():
            self._model.set_adapter(adapter.name)
            tokens = self._tokenizer(texts, truncation=True, max_length=MAX_LENGTH, padding=True, return_tensors="pt")
            hidden = self._model(**tokens).last_hidden_state
            return torch.softmax(self._head(pool(hidden, tokens["attention_mask"], "mean")), -1).tolist()

    async def __call__(self, request: Request) -> dict[str, Any]:
        return {"scores": await self.predict((await request.json())["text"])}


def main(folder: str, port: int) -> None:
    """Serve until SIGTERM."""
    stop = threading.Event()
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="WARNING")
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(Multiplexed.bind(folder))  # type: ignore[attr-defined]
        print("ready", flush=True)
        stop.wait()
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
