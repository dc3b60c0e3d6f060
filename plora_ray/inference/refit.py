"""Users of retained examples, fitted on a new generation, so that who exists only by examples isn't lost with the old one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from plora_ray.errors import DataError, ErasedDuringFit
from plora_ray.inference.fewshot import Examples, FewShotFitter, Fit
from plora_ray.inference.loading import LoadedGeneration
from plora_ray.store.lineage import begun_s, may_hold_fresh
from plora_ray.store.retained import Retained, RetainedExamples

USERS_AT_ONCE = 64


@dataclass
class Refitted:
    """Users by what became of them. standing: fitted on this generation before. refused: for a label that it doesn't know, or erased."""

    fitted: int = 0
    standing: int = 0
    refused: int = 0


def refit_fresh(
    loaded: LoadedGeneration, fitter: FewShotFitter, retained: RetainedExamples, on_users: Callable[[int, int], None]
) -> Refitted:
    """Fit every user of `retained` examples on the loaded generation, a batch at a time. Stopped and called again it goes on.

    Users who have a fresh adapter of this generation's shared parameters are left as they are. on_users: hears how many of how many
    are done. Raises StoreError.
    """
    done, keys = Refitted(), list(retained.keys())
    for start in range(0, len(keys), USERS_AT_ONCE):
        erased = loaded.store.tombstones()
        batch = {}
        for key in keys[start : start + USERS_AT_ONCE]:
            fresh = loaded.store.get_fresh(key)
            if fresh is not None and fresh.basis == loaded.reader.basis:
                done.standing += 1
            elif (examples := unknown_to(loaded, key, retained.of(key, erased.get(key, "")))).texts:
                batch[key] = examples
        trained = loaded.reader.get_many(key for key in batch if key not in erased)
        starts = {key: trained[key].record if key in trained else None for key in batch}
        asked = [Examples(batch[key].texts, batch[key].labels, starts[key]) for key in batch]
        for (key, examples), fit in zip(batch.items(), _fit(fitter, asked), strict=True):
            stored = fit is not None and _store(loaded, key, examples, fit, erased.get(key))
            done.fitted += stored
            done.refused += not stored
        on_users(min(start + USERS_AT_ONCE, len(keys)), len(keys))
    return done


def unknown_to(loaded: LoadedGeneration, key: bytes, examples: Retained) -> Retained:
    """Those of a user's examples that the generation's record of the user can't know, so that none counts twice.

    A record may have taken in an adapter fitted on examples of before, unless the shared parameters are new.
    """
    if loaded.reader.lookup(key) is None or not may_hold_fresh(loaded.reader.manifest):
        return examples
    return examples.after(begun_s(loaded.reader.manifest))


def _fit(fitter: FewShotFitter, users: Sequence[Examples]) -> list[Fit | None]:
    """Every user's fit; None for one whose labels the generation doesn't know."""
    try:
        return list(fitter.fit_many(users))
    except DataError:
        return [None] if len(users) == 1 else [fit for user in users for fit in _fit(fitter, [user])]


def _store(loaded: LoadedGeneration, key: bytes, examples: Retained, fit: Fit, erased: str | None) -> bool:
    try:
        loaded.put_fresh(key, fit.vector, len(examples.texts), erased)
    except ErasedDuringFit:
        return False
    return True
