"""Tokens and rights."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from deployments.auth import Authenticator, Principal
from deployments.problems import Problem
from plora_ray.config import AuthSettings
from plora_ray.errors import ConfigError

KEY = "k" * 32


@pytest.fixture
def authenticator(monkeypatch: pytest.MonkeyPatch) -> Authenticator:
    monkeypatch.setenv("PLORA_JWT_KEY", KEY)
    return Authenticator(AuthSettings(algorithm="HS256", issuer="me", audience="plora"))


def token(key: Any = KEY, algorithm: str = "HS256", **changes: Any) -> str:
    claims = {"sub": "u1", "exp": time.time() + 60, "iss": "me", "aud": "plora", "scope": "predict adapt", **changes}
    return jwt.encode({name: value for name, value in claims.items() if value is not None}, key, algorithm=algorithm)


def test_a_valid_token_may_act_for_its_own_user_within_its_scopes_only(authenticator: Authenticator) -> None:
    caller = authenticate(authenticator, f"Bearer {token()}")
    caller.require("predict", ["u1", "u1"])
    for scope, users in (("predict", ["u1", "u2"]), ("erase", ["u1"]), ("admin", [])):
        with pytest.raises(Problem) as problem:
            caller.require(scope, users)  # type: ignore[arg-type]
        assert problem.value.status == 403


def test_users_star_may_act_for_anyone_and_scopes_may_be_a_list(authenticator: Authenticator) -> None:
    caller = authenticate(authenticator, f"Bearer {token(users='*', scope=None, scopes=['erase'])}")
    assert caller == Principal(frozenset({"erase"}), None)
    caller.require("erase", ["anybody"])


@pytest.mark.parametrize(
    "bad",
    [
        {"exp": time.time() - 60},
        {"exp": None},
        {"sub": None},
        {"iss": "other"},
        {"aud": "other"},
        {"key": "x" * 32},
        {"key": "k" * 64, "algorithm": "HS512"},
    ],
)
def test_an_expired_incomplete_foreign_or_otherwise_signed_token_is_refused(authenticator: Authenticator, bad: dict[str, Any]) -> None:
    with pytest.raises(Problem) as problem:
        authenticate(authenticator, f"Bearer {token(**bad)}")
    assert problem.value.status == 401 and problem.value.headers == {"WWW-Authenticate": "Bearer"}


@pytest.mark.parametrize("header", [None, "", "Basic abc", "Bearer", "Bearer ", "Bearer x.y.z"])
def test_no_token_or_nonsense_is_refused(authenticator: Authenticator, header: str | None) -> None:
    with pytest.raises(Problem) as problem:
        authenticate(authenticator, header)
    assert problem.value.status == 401


def test_an_unsigned_token_is_refused(authenticator: Authenticator) -> None:
    with pytest.raises(Problem):
        authenticate(authenticator, f"Bearer {token(key='', algorithm='none')}")


def test_a_public_key_from_a_file_verifies_and_cannot_be_used_as_an_hmac_secret(tmp_path: Path) -> None:
    private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    public = private.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "key.pem").write_bytes(public)
    verifier = Authenticator(AuthSettings(algorithm="RS256", key_file=tmp_path / "key.pem"))
    plain = {"iss": None, "aud": None}
    assert authenticate(verifier, f"Bearer {token(private, 'RS256', **plain)}").user == "u1"
    with pytest.raises(Problem):
        authenticate(verifier, f"Bearer {token(KEY, **plain)}")


def test_authentication_without_a_usable_key_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PLORA_JWT_KEY", raising=False)
    with pytest.raises(ConfigError, match="PLORA_JWT_KEY"):
        Authenticator(AuthSettings(algorithm="HS256"))
    monkeypatch.setenv("PLORA_JWT_KEY", "short")
    with pytest.raises(ConfigError, match="at least 32"):
        Authenticator(AuthSettings(algorithm="HS256"))
