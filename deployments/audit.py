"""A line for everything that changes whose model answers how: who did it, to whom, and how it ended. No content, no raw ids.

JSON lines through the logger `plora.audit`, to the replica's standard error or to a file.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from deployments.auth import Principal
from deployments.problems import to_problem
from plora_ray.config import AuditSettings
from plora_ray.errors import ConfigError
from plora_ray.identity import user_key
from plora_ray.store.adapters import now_iso

Action = Literal["adapt", "bring_adapter", "erase", "activate"]
LOGGER = "plora.audit"


@dataclass
class AuditedAction:
    """What is known of an action by its end: `generation` is filled in by the handler where there is one."""

    generation: str | None = None


class AuditLog:
    """Writes the lines. Raises ConfigError if the file can't be written."""

    def __init__(self, settings: AuditSettings) -> None:
        self._log = logging.getLogger(LOGGER)
        self._log.propagate, self._log.disabled = False, not settings.enabled
        self._log.setLevel(logging.INFO)
        for handler in list(self._log.handlers):  # of an earlier application in this process
            self._log.removeHandler(handler)
            handler.close()
        if settings.enabled:
            self._log.addHandler(_handler(settings))

    @contextmanager
    def records(self, action: Action, who: Principal, secret: bytes, *, user_id: str | None = None) -> Iterator[AuditedAction]:
        """Write one line when the block ends, however it ends. secret: keys the hashes of caller and user, as in object names."""
        audited, outcome = AuditedAction(), "abandoned"
        status: int | None = None
        try:
            yield audited
            outcome = "done"
        except Exception as error:
            status = to_problem(error).status
            outcome = "refused" if status < 500 else "failed"
            raise
        finally:
            line = {
                "time": now_iso(),
                "action": action,
                "caller": None if who.subject is None else user_key(who.subject, secret).hex(),
                "user": None if user_id is None else user_key(user_id, secret).hex(),
                "outcome": outcome,
                "status": status,
                "generation": audited.generation,
            }
            self._log.info(json.dumps({name: value for name, value in line.items() if value is not None}))


def _handler(settings: AuditSettings) -> logging.Handler:
    handler: logging.Handler = logging.StreamHandler()
    if settings.file is not None:
        try:
            handler = logging.handlers.WatchedFileHandler(settings.file, encoding="utf-8")  # may be rotated from outside
        except OSError as error:
            raise ConfigError(f"serving.audit.file {settings.file} can't be written: {error.strerror}") from error
    handler.setFormatter(logging.Formatter("%(message)s"))
    return handler
