"""Riding out passing failures of storage: random exponential back-off within a bounded time."""

from __future__ import annotations

from tenacity import AsyncRetrying, Retrying, retry_if_exception, stop_after_attempt, stop_before_delay, wait_random_exponential

from plora_ray.store.object_errors import is_transient

FIRST_WAIT_S = 0.1
LONGEST_WAIT_S = 10.0
PART_ATTEMPTS = 4


def retrying(retry_s: float) -> Retrying:
    """Call it with a function and its arguments: tries again while that fails in passing ways, for at most `retry_s` seconds.

    What was raised last passes through. A failure counts by itself or by its cause, so errors that were already worded do, too.
    """
    return Retrying(
        retry=retry_if_exception(_passing),
        stop=stop_before_delay(retry_s),
        wait=wait_random_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S),
        reraise=True,
    )


def retrying_parts() -> AsyncRetrying:
    """For a part of a large write, by itself: as `retrying`, a few times, so that one broken connection doesn't cost all parts."""
    return AsyncRetrying(
        retry=retry_if_exception(_passing),
        stop=stop_after_attempt(PART_ATTEMPTS),
        wait=wait_random_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S),
        reraise=True,
    )


def _passing(error: BaseException) -> bool:
    return is_transient(error) or (error.__cause__ is not None and is_transient(error.__cause__))
