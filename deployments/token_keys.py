"""Where the keys that verify tokens come from: one key from the environment or a file, or a JWK set by the token's `kid`.

Knows key types and how long a set is believed; knows nothing of claims or HTTP requests.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jwt
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from deployments.problems import Problem
from plora_ray.config import AuthSettings
from plora_ray.errors import ConfigError

log = logging.getLogger(__name__)

SHORTEST_HMAC_KEY_BYTES = 32  # RFC 7518, 3.2: at least as long as the hash
SHORTEST_RSA_KEY_BITS = 2048  # RFC 7518, 3.3
FETCH_TIMEOUT_S = 5.0
FRESH_S = 300.0  # a set is asked for again after this time,
COOLDOWN_S = 10.0  # or for an unknown kid, but not sooner than this after the last time: anyone can make kids up
BELIEVED_S = 3600.0  # while the issuer can't be reached; bounds how long a withdrawn key still verifies


class TokenKeys(Protocol):
    """What an Authenticator asks for keys."""

    def at_hand(self, header: Mapping[str, Any]) -> Any:
        """The key for a token of this (unverified) header, fit for the pinned algorithm, if it needn't be fetched; else None."""

    def key(self, header: Mapping[str, Any]) -> Any:
        """The same, fetched if need be: may block for FETCH_TIMEOUT_S. Raises Problem 401 or 503."""


class OneKey:
    """One key, read at start. Raises ConfigError if it is missing, too short or of another type than the algorithm's."""

    def __init__(self, settings: AuthSettings) -> None:
        text, self._key = _read(settings), None
        if settings.algorithm != "HS256":
            try:
                self._key = jwt.get_algorithm_by_name(str(settings.algorithm)).prepare_key(text)
            except (jwt.PyJWTError, ValueError, TypeError):
                raise ConfigError(f"the key of serving.auth is no public key in PEM form, as {settings.algorithm} needs") from None
            if not _fits(self._key, settings.algorithm):
                raise ConfigError(f"the key of serving.auth is not of the type or size that {settings.algorithm} needs")
        elif len(text.encode()) < SHORTEST_HMAC_KEY_BYTES:
            raise ConfigError(f"the HS256 key has {len(text.encode())} bytes; use at least {SHORTEST_HMAC_KEY_BYTES} random ones")
        else:
            self._key = text

    def at_hand(self, header: Mapping[str, Any]) -> Any:
        return self._key

    key = at_hand


class KeySet:
    """Public keys by `kid`, fetched again when they are old or a token names one that isn't there. Threads may share it.

    fetch: the keys of the set, from wherever it is kept. Keys of another type than the algorithm's are left out.
    """

    def __init__(self, fetch: Callable[[], list[jwt.PyJWK]], algorithm: str) -> None:
        self._fetch, self._algorithm = fetch, algorithm
        self._keys: dict[str, Any] = {}
        self._fetched_s = self._tried_s = float("-inf")
        self._fetching = threading.Lock()

    def at_hand(self, header: Mapping[str, Any]) -> Any:
        return self._keys.get(str(header.get("kid"))) if self._age_s() <= FRESH_S else None

    def key(self, header: Mapping[str, Any]) -> Any:
        kid = header.get("kid")
        if not isinstance(kid, str):
            raise unauthorized("the bearer token's header has no kid, which says what key it was signed with")
        known = kid in self._keys
        if not known or self._age_s() > FRESH_S:
            self.refresh(wait=not known or self._age_s() > BELIEVED_S)
        if self._age_s() > BELIEVED_S:
            raise Problem(503, "the keys of the token issuer can't be fetched just now: try again")
        if kid not in self._keys:
            raise unauthorized("the bearer token was signed with a key that its issuer doesn't name")
        return self._keys[kid]

    def refresh(self, wait: bool) -> None:
        """Fetch the set unless that was tried a moment ago. wait: until another thread, which is at it, has done so."""
        if not self._fetching.acquire(blocking=wait):
            return
        try:
            if time.monotonic() - self._tried_s < COOLDOWN_S:
                return
            try:
                fetched = self._fetch()
            except (jwt.PyJWTError, OSError, ValueError) as error:
                log.warning("the JWK set can't be fetched: %s: %s", type(error).__name__, error)
            else:
                self._keys = {key.key_id: key.key for key in fetched if key.key_id and _fits(key.key, self._algorithm)}
                self._fetched_s = time.monotonic()
        finally:
            self._tried_s = time.monotonic()
            self._fetching.release()

    @property
    def empty(self) -> bool:
        """Whether no usable key was found so far."""
        return not self._keys

    def _age_s(self) -> float:
        return time.monotonic() - self._fetched_s


def token_keys(settings: AuthSettings) -> TokenKeys:
    """The keys that the settings name. Raises ConfigError if they can't be used; an issuer that can't be reached is asked later."""
    algorithm = str(settings.algorithm)
    if settings.jwks_url is not None:
        client = jwt.PyJWKClient(settings.jwks_url, timeout=FETCH_TIMEOUT_S, cache_jwk_set=False)
        return KeySet(client.get_signing_keys, algorithm)
    if settings.jwks_file is not None:
        path = settings.jwks_file
        keys = KeySet(lambda: jwt.PyJWKSet.from_json(path.read_text(encoding="utf-8")).keys, algorithm)
        keys.refresh(wait=True)
        if keys.empty:
            raise ConfigError(f"serving.auth.jwks_file {path} can't be read or holds no {algorithm} key with a kid")
        return keys
    return OneKey(settings)


def unauthorized(detail: str) -> Problem:
    """401 as RFC 6750 wants it."""
    return Problem(401, detail, headers={"WWW-Authenticate": "Bearer"})


def _fits(key: Any, algorithm: str | None) -> bool:
    """Whether this is a public key of the type that `algorithm` verifies with: a shared secret or another curve never is."""
    if algorithm == "RS256":
        return isinstance(key, RSAPublicKey) and key.key_size >= SHORTEST_RSA_KEY_BITS
    return isinstance(key, EllipticCurvePublicKey) and isinstance(key.curve, SECP256R1)


def _read(settings: AuthSettings) -> str:
    if settings.key_file is not None:
        try:
            key = settings.key_file.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ConfigError(f"serving.auth.key_file {settings.key_file} can't be read: {error.strerror}") from error
    else:
        key = os.environ.get(settings.key_env, "")
    if not key:
        raise ConfigError(f"serving.auth is on: put the verification key in the environment variable {settings.key_env} or name a key_file")
    return key
