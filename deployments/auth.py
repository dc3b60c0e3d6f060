"""Who may do what: bearer tokens (JWT) verified before anything else is looked at.

A token's `sub` may act for the user of that id only; with `users: "*"` it may act for any. Scopes: predict, adapt, erase,
admin, as a space-separated `scope` claim or a `scopes` list.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import jwt

from deployments.problems import Problem
from deployments.token_keys import token_keys, unauthorized
from plora_ray.config import AuthSettings

Scope = Literal["predict", "adapt", "erase", "admin"]

LEEWAY_S = 10
KEY_THREADS = 2


@dataclass(frozen=True)
class Principal:
    """A verified caller. subject: the token's `sub`, None without authentication. user: the only user id it may act for; None for any."""

    scopes: frozenset[str]
    user: str | None
    subject: str | None = None

    def require(self, scope: Scope, users: Iterable[str] = ()) -> None:
        """Raises Problem 403 unless the caller has `scope` and may act for all of `users`."""
        if scope not in self.scopes:
            raise Problem(403, f"this token lacks the scope '{scope}'")
        if self.user is not None and any(user != self.user for user in users):
            raise Problem(403, "this token may act for its own user only")


ANYONE = Principal(frozenset({"predict", "adapt", "erase", "admin"}), None)


class Authenticator:
    """Verifies tokens by the settings; with authentication off, everyone may do everything.

    Raises ConfigError if the key is missing, too short or of the wrong type.
    """

    def __init__(self, settings: AuthSettings) -> None:
        self._settings = settings
        self._keys = token_keys(settings) if settings.algorithm else None
        # Threads of their own: kids are made up by anyone, and waiting for an issuer mustn't keep the store's calls from running.
        self._threads = ThreadPoolExecutor(KEY_THREADS, thread_name_prefix="token-keys")

    @property
    def enabled(self) -> bool:
        return self._keys is not None

    async def authenticate(self, authorization: str | None) -> Principal:
        """The caller behind an Authorization header. Raises Problem 401, or 503 while the issuer's keys can't be had."""
        if self._keys is None:
            return ANYONE
        kind, _, token = (authorization or "").partition(" ")
        if kind.lower() != "bearer" or not token.strip():
            raise unauthorized("send a bearer token in the Authorization header")
        try:
            header = jwt.get_unverified_header(token.strip())
            if header.get("alg") != self._settings.algorithm:  # before a key is looked for, which costs more
                raise unauthorized(f"the bearer token is not valid: it must be signed with {self._settings.algorithm}")
            key = self._keys.at_hand(header)
            if key is None:
                key = await asyncio.get_running_loop().run_in_executor(self._threads, self._keys.key, header)
            return _principal(self._claims(token.strip(), key))
        except jwt.PyJWTError as error:
            raise unauthorized(f"the bearer token is not valid: {error}") from None

    def _claims(self, token: str, key: Any) -> dict[str, Any]:
        settings = self._settings
        required = ["exp", "sub"] + (["iss"] if settings.issuer else []) + (["aud"] if settings.audience else [])
        return jwt.decode(
            token, key, algorithms=[str(settings.algorithm)], issuer=settings.issuer, audience=settings.audience, leeway=LEEWAY_S,
            options={"require": required},
        )  # fmt: skip


def _principal(claims: dict[str, Any]) -> Principal:
    scope, listed = claims.get("scope", ""), claims.get("scopes", [])
    names = (scope.split() if isinstance(scope, str) else []) + (listed if isinstance(listed, list) else [])
    subject = str(claims["sub"])
    return Principal(frozenset(str(name) for name in names), None if claims.get("users") == "*" else subject, subject)
