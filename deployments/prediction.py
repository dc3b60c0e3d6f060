"""What a Predictor replica does for each call, below HTTP: answer rows, adapt and erase users, list and move generations."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from deployments.engines import CurrentGeneration
from deployments.fitting import FitRequest, FitResult
from deployments.problems import Problem
from plora_ray.config import Settings
from plora_ray.data.rows import RowProblem, class_label, number_label
from plora_ray.errors import DataError
from plora_ray.inference import Answer, InferenceEngine, LoadedGeneration
from plora_ray.inference.batcher import EngineClosed
from plora_ray.inference.uses import UseRecorder
from plora_ray.store import UserAdapter
from plora_ray.store.adapter_store import GenerationInfo

SUBMIT_THREADS = 64
Fit = Callable[[FitRequest], Awaitable[FitResult]]


@dataclass(frozen=True)
class Adapted:
    """A user's fitted adapter; version is the token that makes any replica serve at least it."""

    examples: int
    generation: str
    version: str
    loss_before: float
    loss_after: float
    seconds: float


class PredictionService:
    """One replica's work. fit: where few-shot fits are computed (another deployment, so that they never delay answers)."""

    def __init__(self, settings: Settings, fit: Fit) -> None:
        self.settings = settings
        self._fit = fit
        # A pool of their own: requests that wait for a slow store mustn't keep erasures and listings from running.
        self._threads = ThreadPoolExecutor(SUBMIT_THREADS, thread_name_prefix="submit")
        self._current: CurrentGeneration[InferenceEngine] = CurrentGeneration(
            settings, self._build, retire=lambda engine: engine.close(), on_erased=lambda engine, erased: engine.cache.evict(erased)
        )
        unused_days = settings.store.retention.unused_adapters_days
        self._uses = None if unused_days is None else UseRecorder(self._current.store.objects)

    @property
    def ready(self) -> bool:
        """Whether a generation is loaded."""
        return self._current.ready

    @property
    def loaded(self) -> LoadedGeneration:
        """The generation that answers. Raises StoreError before there is one."""
        return self._current.get()[0]

    async def predict(self, rows: Sequence[tuple[str, str]], at_least: str = "") -> list[Answer]:
        """Answers for (user_id, text) rows, all by one generation. Raises QueueFull, TimeoutError, StoreError."""
        async with asyncio.timeout(self.settings.serving.request_timeout_s):
            while True:
                _, engine = self._current.get()
                try:
                    pending = await asyncio.get_running_loop().run_in_executor(self._threads, engine.submit, rows, at_least)
                except EngineClosed:
                    continue  # swapped in between: the new one answers
                logits = await asyncio.gather(*(asyncio.wrap_future(future) for future in pending.logits))
                answers = engine.finish(pending, logits)
                if self._uses is not None:
                    served = (user for (user, _), answer in zip(rows, answers, strict=True) if answer.personalization == "adapter")
                    self._uses.note(map(engine.loaded.store.key, served))
                return answers

    async def adapt(self, user_id: str, texts: Sequence[str], labels: Sequence[object]) -> Adapted:
        """Fit this user's adapter on these examples and store it; this replica serves it at once."""
        began = time.monotonic()
        loaded, engine = self._current.get()
        canonical = [self._label(loaded, place, label) for place, label in enumerate(labels)]
        result = await self._fit(FitRequest(loaded.store.key(user_id), list(texts), canonical))
        if result.error is not None:
            raise result.error
        assert result.adapter is not None
        engine.admit(result.adapter)
        return Adapted(
            examples=len(texts), generation=result.adapter.generation, version=result.adapter.version, loss_before=result.loss_before,
            loss_after=result.loss_after, seconds=time.monotonic() - began,
        )  # fmt: skip

    async def user(self, user_id: str) -> UserAdapter | None:
        """The adapter that answers for this user, read from the store; None if the population does."""
        loaded = self.loaded
        return await asyncio.to_thread(lambda: loaded.store.pull(loaded.reader, loaded.store.key(user_id)))

    async def erase(self, user_id: str) -> None:
        """Erase the user from the store and this replica; other replicas learn of it within serving.refresh_s."""
        loaded, engine = self._current.get()
        key = loaded.store.key(user_id)
        await asyncio.to_thread(loaded.store.erase, key)
        engine.cache.evict([key])
        await asyncio.to_thread(self._current.learn_erasures)

    async def generations(self) -> list[GenerationInfo]:
        """Published generations, oldest first."""
        return await asyncio.to_thread(lambda: self._current.store.generations())

    async def activate(self, generation: str) -> None:
        """Make a published generation serve; returns when this replica does. Raises Problem 404 if there is none of this id."""
        store = self._current.store
        published = await asyncio.to_thread(store.generations)
        if generation not in [info.generation for info in published]:
            raise Problem(404, "there is no generation of this id: GET /v1/generations lists them")
        await asyncio.to_thread(store.activate, generation)
        await asyncio.to_thread(self._current.follow)
        if self.loaded.name != generation:
            raise Problem(503, "this generation is current now, but this replica can't load it: see its log, or activate another")

    def close(self) -> None:
        """Answer what is queued, then stop."""
        self._current.close()
        if self._uses is not None:
            self._uses.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _build(self, loaded: LoadedGeneration) -> InferenceEngine:
        serving = self.settings.serving
        return InferenceEngine(
            loaded, batch_tokens=serving.batch_tokens, batch_rows=serving.batch_rows, wait_s=serving.batch_wait_ms / 1000,
            queued_texts=serving.limits.queued_texts, cache_bytes=serving.cache_bytes, max_age_s=serving.adapter_max_age_s,
            unknown_ttl_s=serving.unknown_user_ttl_s,
        )  # fmt: skip

    def _label(self, loaded: LoadedGeneration, place: int, label: object) -> str | float:
        """The label as training data would hold it. Raises Problem 422 naming the example."""
        try:
            canonical = class_label(label) if loaded.labels.task == "classification" else number_label(label)
            loaded.labels.encode([canonical])
        except (RowProblem, DataError) as error:
            field = f"examples[{place}].label"
            raise Problem(422, f"{field}: {error}", fields=[(field, str(error))]) from None
        return canonical
