"""What a replica tells of its work to whoever measures it: calls with their outcome, and all that its engine tells.

Knows no metrics library and no HTTP. Nothing here names a user or holds a text.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from opentelemetry import trace

from plora_ray.errors import PloraError, StoreError
from plora_ray.inference.batcher import QueueFull
from plora_ray.inference.observer import EngineObserver

Call = Literal["predict", "adapt", "erase", "activate"]
# refused: the caller asked for what can't be. failed: a bug.
Outcome = Literal["ok", "refused", "queue_full", "timeout", "unavailable", "client_gone", "failed"]

_tracer = trace.get_tracer("plora_ray")


class ServiceObserver(EngineObserver):
    """Told of everything a replica does; this one lets it pass. Called from several threads."""

    def on_call(self, call: Call, outcome: Outcome, seconds: float) -> None:
        """A call has ended."""

    def on_generation(self, created_at: str) -> None:
        """A generation, made at this ISO 8601 time, answers from now on."""


@contextmanager
def observed(observer: ServiceObserver, call: Call) -> Iterator[None]:
    """Tells of the call that is made within, and is a span of OpenTelemetry where a tracer is configured."""
    began = time.monotonic()
    outcome: Outcome = "ok"
    with _tracer.start_as_current_span(f"plora.{call}", record_exception=False, set_status_on_exception=False) as span:
        try:
            yield
        except BaseException as error:
            outcome = outcome_of(error)
            raise
        finally:
            span.set_attribute("plora.outcome", outcome)
            observer.on_call(call, outcome, time.monotonic() - began)


def outcome_of(error: BaseException) -> Outcome:
    """What a call that ended so is counted as."""
    match error:
        case QueueFull():
            return "queue_full"
        case TimeoutError():
            return "timeout"
        case StoreError():
            return "unavailable"
        case asyncio.CancelledError():
            return "client_gone"
        case PloraError():
            return "refused"
        case _:
            return "failed"
