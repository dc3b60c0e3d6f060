"""What a Predictor replica does for each call, below HTTP: answer rows, adapt and erase users, list and move generations."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from deployments.bringing import BroughtAdapter, store_brought
from deployments.engines import CurrentGeneration, Served, Serving
from deployments.fitting import FitRequest, FitResult
from deployments.observer import ServiceObserver, observed
from deployments.problems import Problem
from plora_ray.config import Settings
from plora_ray.data.rows import RowProblem, class_label, number_label
from plora_ray.errors import DataError
from plora_ray.inference import Answer, InferenceEngine, LoadedGeneration
from plora_ray.inference.batcher import EngineClosed
from plora_ray.inference.engine import PendingAnswers
from plora_ray.inference.opening import EngineBuilder
from plora_ray.inference.uses import UseRecorder
from plora_ray.store import UserAdapter
from plora_ray.store.adapter_store import GenerationInfo
from plora_ray.store.shared import encode_shared

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

    def __init__(self, settings: Settings, fit: Fit, observer: ServiceObserver | None = None) -> None:
        self.settings = settings
        self._fit = fit
        self._observer = observer or ServiceObserver()
        self._builder = EngineBuilder(settings.serving, self._observer)
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
    def serving(self) -> Serving[InferenceEngine]:
        """The generations that answer. Raises StoreError before there is one."""
        return self._current.get()

    def serving_user(self, user_id: str) -> Served[InferenceEngine]:
        """The generation that answers this user. Raises StoreError before one is loaded."""
        return self._current.get().for_users([self._current.store.key(user_id)])

    @property
    def hash_secret(self) -> bytes:
        """What keys the hashes of users. Raises StoreError while the store can't be opened."""
        return self._current.store.hash_secret

    async def predict(self, rows: Sequence[tuple[str, str]], at_least: str = "", timeout_s: float | None = None) -> list[Answer]:
        """Answers for (user_id, text) rows, all by one generation. Raises QueueFull, TimeoutError, StoreError.

        timeout_s: the caller's own, where it is shorter than serving.request_timeout_s; rows that are still queued then are never computed.
        """
        with observed(self._observer, "predict"):
            keys = {self._current.store.key(user_id) for user_id, _ in rows}
            async with asyncio.timeout(self._bounded(timeout_s)):
                while True:
                    engine = self._current.get().for_users(keys).built
                    submitted = self._threads.submit(engine.submit, rows, at_least)
                    try:
                        pending = await asyncio.wrap_future(submitted)
                    except EngineClosed:
                        continue  # swapped in between: the new one answers
                    except asyncio.CancelledError:
                        submitted.add_done_callback(_skip)
                        raise
                    logits = await asyncio.gather(*(asyncio.wrap_future(future) for future in pending.logits))
                    answers = engine.finish(pending, logits)
                    if self._uses is not None:
                        served = (user for (user, _), answer in zip(rows, answers, strict=True) if answer.personalization == "adapter")
                        self._uses.note(map(engine.loaded.store.key, served))
                    return answers

    async def adapt(self, user_id: str, texts: Sequence[str], labels: Sequence[object], timeout_s: float | None = None) -> Adapted:
        """Fit this user's adapter on these examples and store it; this replica serves it at once.

        timeout_s: the caller's own; an adapter that is finished later may be stored all the same. Raises TimeoutError.
        """
        began = time.monotonic()
        with observed(self._observer, "adapt"):
            served = self.serving_user(user_id)
            canonical = [self._label(served.loaded, place, label) for place, label in enumerate(labels)]
            async with asyncio.timeout(timeout_s):
                result = await self._fit(FitRequest(served.loaded.store.key(user_id), list(texts), canonical))
            if result.error is not None:
                raise result.error
            assert result.adapter is not None
            self._admit(result.adapter)
        return Adapted(
            examples=len(texts), generation=result.adapter.generation, version=result.adapter.version, loss_before=result.loss_before,
            loss_after=result.loss_after, seconds=time.monotonic() - began,
        )  # fmt: skip

    async def bring(self, user_id: str, brought: BroughtAdapter) -> UserAdapter:
        """Store an adapter that was fitted elsewhere, checked like anything hostile; this replica serves it at once.

        Raises as `store_brought`.
        """
        loaded = self.serving_user(user_id).loaded
        farthest = self.settings.serving.limits.adapter_norm
        adapter = await asyncio.to_thread(store_brought, loaded, loaded.store.key(user_id), brought, farthest)
        self._admit(adapter)
        return adapter

    async def user(self, user_id: str) -> UserAdapter | None:
        """The adapter that answers for this user, read from the store; None if the population does."""
        loaded = self.serving_user(user_id).loaded
        return await asyncio.to_thread(lambda: loaded.store.pull(loaded.reader, loaded.store.key(user_id)))

    async def erase(self, user_id: str) -> None:
        """Erase the user from the store and this replica; other replicas learn of it within serving.refresh_s."""
        with observed(self._observer, "erase"):
            store = self._current.store
            key = store.key(user_id)
            await asyncio.to_thread(store.erase, key)
            for served in self._current.get().all:
                served.built.cache.evict([key])
            await asyncio.to_thread(self._current.learn_erasures)

    async def generations(self) -> list[GenerationInfo]:
        """Published generations, oldest first."""
        return await asyncio.to_thread(lambda: self._current.store.generations())

    async def shared(self, generation: str) -> tuple[str, bytes]:
        """A serving generation's basis and its shared.safetensors. Raises Problem 404 if it doesn't serve here."""
        for served in self._current.get().all:
            if served.name == generation:
                weights = served.loaded.reader.shared()
                return served.loaded.reader.basis, await asyncio.to_thread(encode_shared, weights.tensors, weights.metadata)
        raise Problem(404, "no generation of this id serves here")

    async def activate(self, generation: str) -> None:
        """Make a published generation serve; returns when this replica does. Raises Problem 404 if there is none of this id."""
        with observed(self._observer, "activate"):
            store = self._current.store
            published = await asyncio.to_thread(store.generations)
            if generation not in [info.generation for info in published]:
                raise Problem(404, "there is no generation of this id: GET /v1/generations lists them")
            await asyncio.to_thread(store.activate, generation)
            await asyncio.to_thread(self._current.follow)
            if not self.ready or self.serving.current.name != generation:
                raise Problem(503, "this generation is current now, but this replica can't load it: see its log, or activate another")

    def close(self) -> None:
        """Answer what is queued, then stop."""
        self._current.close()
        if self._uses is not None:
            self._uses.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _build(self, loaded: LoadedGeneration) -> InferenceEngine:
        engine = self._builder.build(loaded)
        self._observer.on_generation(loaded.reader.manifest.created_at)
        return engine

    def _admit(self, adapter: UserAdapter) -> None:
        for served in self._current.get().all:
            served.built.admit(adapter)

    def _bounded(self, timeout_s: float | None) -> float:
        longest = self.settings.serving.request_timeout_s
        return longest if timeout_s is None else min(timeout_s, longest)

    def _label(self, loaded: LoadedGeneration, place: int, label: object) -> str | float:
        """The label as training data would hold it. Raises Problem 422 naming the example."""
        try:
            canonical = class_label(label) if loaded.labels.task == "classification" else number_label(label)
            loaded.labels.encode([canonical])
        except (RowProblem, DataError) as error:
            field = f"examples[{place}].label"
            raise Problem(422, f"{field}: {error}", fields=[(field, str(error))]) from None
        return canonical


def _skip(submitted: Future[PendingAnswers]) -> None:
    """Nobody waits for these rows any more."""
    if not submitted.cancelled() and submitted.exception() is None:
        for future in submitted.result().logits:
            future.cancel()
