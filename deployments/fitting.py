"""What the Personalizer does, below Ray: many users' few-shot fits as one, stored before they are acknowledged."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from deployments.engines import CurrentGeneration, Served
from plora_ray.config import Settings
from plora_ray.errors import PloraError
from plora_ray.inference import Examples, FewShotFitter, LoadedGeneration
from plora_ray.inference.fewshot import Fit
from plora_ray.inference.refit import unknown_to
from plora_ray.store import UserAdapter
from plora_ray.store.retained import Retained, RetainedExamples


@dataclass(frozen=True)
class FitRequest:
    """One user's key and examples; labels as training data holds them. earlier: retained ones, which are fitted with them."""

    key: bytes
    texts: list[str]
    labels: list[str | float]
    earlier: Retained = field(default_factory=Retained)


@dataclass(frozen=True)
class FitResult:
    """The stored adapter and its losses, or the error that kept it from being stored."""

    adapter: UserAdapter | None
    loss_before: float = 0.0
    loss_after: float = 0.0
    error: PloraError | None = None


class FittingService:
    """Fits users, each on the generation that answers that user."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._retention = settings, settings.store.retention
        self._current: CurrentGeneration[FewShotFitter] = CurrentGeneration(settings, self._build)

    def fit(self, requests: Sequence[FitRequest]) -> list[FitResult]:
        """Fit all users together and store each adapter. One user's failure is that user's alone. Blocks."""
        serving = self._current.get()
        together: dict[str, list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            together[serving.for_users([request.key]).name].append(place)
        results: dict[int, FitResult] = {}
        for served in serving.all:
            places = together[served.name]
            fitted = self._fit_on(served, [requests[place] for place in places])
            results.update(zip(places, fitted, strict=True))
        return [results[place] for place in range(len(requests))]

    def close(self) -> None:
        """Stop following the store."""
        self._current.close()

    def _build(self, loaded: LoadedGeneration) -> FewShotFitter:
        serving = self._settings.serving
        return FewShotFitter(loaded, batch_tokens=serving.batch_tokens, batch_rows=serving.batch_rows, farthest=serving.limits.adapter_norm)

    def _fit_on(self, served: Served[FewShotFitter], requests: Sequence[FitRequest]) -> list[FitResult]:
        loaded, fitter = served.loaded, served.built
        # Before the fit: an erasure that arrives while it runs must win.
        erased = loaded.store.tombstones() if requests else {}
        requests = [self._with_earlier(loaded, request, erased.get(request.key)) for request in requests]
        try:
            fits = self._fit(loaded, fitter, requests, erased)
        except PloraError as error:
            if len(requests) == 1:
                return [FitResult(None, error=error)]
            return [result for request in requests for result in self._fit_on(served, [request])]
        return [self._store(loaded, request, erased.get(request.key), fit) for request, fit in zip(requests, fits, strict=True)]

    def _fit(
        self, loaded: LoadedGeneration, fitter: FewShotFitter, requests: Sequence[FitRequest], erased: Mapping[bytes, str]
    ) -> list[Fit]:
        trained = loaded.reader.get_many([request.key for request in requests if request.key not in erased])
        starts = [trained[request.key].record if request.key in trained else None for request in requests]
        every = [request.earlier.joined(request.texts, request.labels, 0.0) for request in requests]
        return fitter.fit_many([Examples(one.texts, one.labels, start) for one, start in zip(every, starts, strict=True)])

    def _with_earlier(self, loaded: LoadedGeneration, request: FitRequest, erased: str | None) -> FitRequest:
        retained = self._retained(loaded)
        if retained is None:
            return request
        return replace(request, earlier=unknown_to(loaded, request.key, retained.of(request.key, erased or "")))

    def _retained(self, loaded: LoadedGeneration) -> RetainedExamples | None:
        days = self._retention.examples_days
        return None if days is None else loaded.store.retained_examples(days)

    def _store(self, loaded: LoadedGeneration, request: FitRequest, erased: str | None, fit: Fit) -> FitResult:
        examples = len(request.earlier.joined(request.texts, request.labels, 0.0).texts)
        try:
            adapter = loaded.put_fresh(request.key, fit.vector, examples, erased)
            if (retained := self._retained(loaded)) is not None:
                retained.keep(request.key, request.texts, request.labels, erased or "")
        except PloraError as error:
            return FitResult(None, error=error)
        return FitResult(adapter, fit.loss_before, fit.loss_after)
