"""Who may do what: bearer tokens (JWT) verified before anything else is looked at.

A token's `sub` may act for the user of that id only; with `users: "*"` it may act for any. Scopes: predict, adapt, erase,
admin, as a space-separated `scope` claim or a `scopes` list.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import jwt

from deployments.problems import Problem
from plora_ray.config import AuthSettings
from plora_ray.errors import ConfigError

Scope = Literal["predict", "adapt", "erase", "admin"]

SHORTEST_HMAC_KEY_BYTES = 32  # RFC 7518, 3.2: at least as long as the hash
LEEWAY_S = 10


@dataclass(frozen=True)
class Principal:
    """A verified caller. user: the only user id it may act for; None for any."""

    scopes: frozenset[str]
    user: str | None

    def require(self, scope: Scope, users: Iterable[str] = ()) -> None:
        """Raises Problem 403 unless the caller has `scope` and may act for all of `users`."""
        if scope not in self.scopes:
            raise Problem(403, f"this token lacks the scope '{scope}'")
        if self.user is not None and any(user != self.user for user in users):
            raise Problem(403, "this token may act for its own user only")


ANYONE = Principal(frozenset({"predict", "adapt", "erase", "admin"}), None)


class Authenticator:
    """Verifies tokens by the settings; with authentication off, everyone may do everything.

    Raises ConfigError if the key is missing or too short.
    """

    def __init__(self, settings: AuthSettings) -> None:
        self._settings = settings
        self._key = _read_key(settings) if settings.algorithm else ""

    @property
    def enabled(self) -> bool:
        return self._settings.algorithm is not None

    def authenticate(self, authorization: str | None) -> Principal:
        """The caller behind an Authorization header. Raises Problem 401."""
        if self._settings.algorithm is None:
            return ANYONE
        kind, _, token = (authorization or "").partition(" ")
        if kind.lower() != "bearer" or not token.strip():
            raise _unauthorized("send a bearer token in the Authorization header")
        required = ["exp", "sub"] + (["iss"] if self._settings.issuer else []) + (["aud"] if self._settings.audience else [])
        try:
            claims = jwt.decode(
                token.strip(), self._key, algorithms=[self._settings.algorithm], issuer=self._settings.issuer,
                audience=self._settings.audience, leeway=LEEWAY_S, options={"require": required},
            )  # fmt: skip
        except jwt.PyJWTError as error:
            raise _unauthorized(f"the bearer token is not valid: {error}") from None
        return _principal(claims)


def _principal(claims: dict[str, Any]) -> Principal:
    scope, listed = claims.get("scope", ""), claims.get("scopes", [])
    names = (scope.split() if isinstance(scope, str) else []) + (listed if isinstance(listed, list) else [])
    return Principal(frozenset(str(name) for name in names), None if claims.get("users") == "*" else str(claims["sub"]))


def _read_key(settings: AuthSettings) -> str:
    if settings.key_file is not None:
        try:
            key = settings.key_file.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ConfigError(f"serving.auth.key_file {settings.key_file} can't be read: {error.strerror}") from error
    else:
        key = os.environ.get(settings.key_env, "")
    if not key:
        raise ConfigError(f"serving.auth is on: put the verification key in the environment variable {settings.key_env} or name a key_file")
    if settings.algorithm == "HS256" and len(key.encode()) < SHORTEST_HMAC_KEY_BYTES:
        raise ConfigError(f"the HS256 key has {len(key.encode())} bytes; use at least {SHORTEST_HMAC_KEY_BYTES} random ones")
    return key


def _unauthorized(detail: str) -> Problem:
    return Problem(401, detail, headers={"WWW-Authenticate": "Bearer"})
