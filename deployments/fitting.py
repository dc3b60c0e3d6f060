"""What the Personalizer does, below Ray: many users' few-shot fits as one, stored before they are acknowledged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deployments.engines import CurrentGeneration
from plora_ray.config import Settings
from plora_ray.errors import PloraError
from plora_ray.inference import Examples, FewShotFitter, LoadedGeneration
from plora_ray.inference.fewshot import Fit
from plora_ray.store import UserAdapter, new_version
from plora_ray.store.adapters import now_iso


@dataclass(frozen=True)
class FitRequest:
    """One user's key and examples; labels as training data holds them."""

    key: bytes
    texts: list[str]
    labels: list[str | float]


@dataclass(frozen=True)
class FitResult:
    """The stored adapter and its losses, or the error that kept it from being stored."""

    adapter: UserAdapter | None
    loss_before: float = 0.0
    loss_after: float = 0.0
    error: PloraError | None = None


class FittingService:
    """Fits users on the current generation."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._current: CurrentGeneration[FewShotFitter] = CurrentGeneration(settings, self._build)

    def fit(self, requests: Sequence[FitRequest]) -> list[FitResult]:
        """Fit all users together and store each adapter. One user's failure is that user's alone. Blocks."""
        loaded, fitter = self._current.get()
        # Drawn before the fit: an erasure that arrives while it runs is newer and wins.
        erased = loaded.store.tombstones()
        versions = [new_version(after=erased.get(request.key)) for request in requests]
        trained = loaded.reader.get_many([request.key for request in requests if request.key not in erased])
        examples = [
            Examples(request.texts, request.labels, trained[request.key].record if request.key in trained else None) for request in requests
        ]
        fits = fitter.fit_many(examples)
        return [self._store(loaded, request, version, fit) for request, version, fit in zip(requests, versions, fits, strict=True)]

    def close(self) -> None:
        """Stop following the store."""
        self._current.close()

    def _build(self, loaded: LoadedGeneration) -> FewShotFitter:
        return FewShotFitter(loaded, batch_tokens=self._settings.serving.batch_tokens, batch_rows=self._settings.serving.batch_rows)

    def _store(self, loaded: LoadedGeneration, request: FitRequest, version: str, fit: Fit) -> FitResult:
        adapter = UserAdapter(
            key=request.key, record=fit.vector, examples=len(request.texts), generation=loaded.name, version=version, updated_at=now_iso(),
            source="fresh", basis=loaded.reader.basis,
        )  # fmt: skip
        try:
            loaded.store.put_fresh(adapter)
        except PloraError as error:
            return FitResult(None, error=error)
        return FitResult(adapter, fit.loss_before, fit.loss_after)
