"""What a request passes before anything is done for it: token, rate, deadline, version token; and the audit log it leaves a line in.

Annotations here are evaluated at once (no postponed evaluation): FastAPI reads them.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Annotated, Any

from fastapi import Depends, Header, Request
from fastapi.security import HTTPBearer

from deployments.audit import Action, AuditedAction, AuditLog
from deployments.auth import Authenticator, Principal
from deployments.prediction import PredictionService
from deployments.problems import Problem
from deployments.rates import Rates
from plora_ray.config import ServingSettings
from plora_ray.store import is_version

VERSION_HEADER = "X-Adapter-Version"
TIMEOUT_HEADER = "X-Request-Timeout-Seconds"


class Doors:
    """Dependencies of the routes. service: gives the replica's service at each call. Raises ConfigError for unusable keys and files."""

    def __init__(self, settings: ServingSettings, service: Callable[[], PredictionService]) -> None:
        limits = settings.limits
        self._authenticator, self._service = Authenticator(settings.auth), service
        self._requests = None if limits.requests_per_minute is None else Rates(limits.requests_per_minute, limits.requests_burst)
        self._adaptations = Rates(limits.adaptations_per_minute, limits.adaptations_per_minute)
        self._audit = AuditLog(settings.audit)
        # Only says in the interface's description how a token is sent.
        self.described: list[Any] = [Depends(HTTPBearer(auto_error=False, bearerFormat="JWT"))] if self._authenticator.enabled else []

    async def caller(self, request: Request) -> Principal:
        """Who asks. Raises Problem 401 or 503."""
        return await self._authenticator.authenticate(request.headers.get("Authorization"))

    async def paced_caller(self, request: Request) -> Principal:
        """Who asks, not more often than serving.limits.requests_per_minute allows. Raises Problem 401, 429 or 503."""
        who = await self.caller(request)
        if self._requests is not None:
            self._requests.spend(who.subject, "requests with tokens of this subject")
        return who

    async def at_least(self, value: Annotated[str | None, Header(alias=VERSION_HEADER)] = None) -> str:
        """The version token a client echoes; empty for none. Raises Problem 422 if it isn't one."""
        if value is not None and not is_version(value):
            raise Problem(422, f"{VERSION_HEADER}: not a version token", fields=[(VERSION_HEADER, "send back what an earlier answer gave")])
        return value or ""

    async def timeout_s(self, value: Annotated[float | None, Header(alias=TIMEOUT_HEADER)] = None) -> float | None:
        """How long the caller waits at most; None if it doesn't say. Raises Problem 422 unless it is a positive number."""
        if value is not None and not (math.isfinite(value) and value > 0):
            raise Problem(422, f"{TIMEOUT_HEADER}: not a number of seconds above 0", fields=[(TIMEOUT_HEADER, "send seconds, or nothing")])
        return value

    def pace_adaptation(self, user_id: str) -> None:
        """Raises Problem 429 if this user was adapted too often."""
        self._adaptations.spend(user_id, "adaptations of this user")

    def audited(self, action: Action, who: Principal, *, user_id: str | None = None) -> AbstractContextManager[AuditedAction]:
        """A block that leaves a line in the audit log when it ends."""
        return self._audit.records(action, who, self._service().hash_secret, user_id=user_id)
