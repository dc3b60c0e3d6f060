"""Tokens and rights."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from deployments import token_keys
from deployments.auth import Authenticator, Principal
from deployments.problems import Problem
from plora_ray.config import AuthSettings, parse_settings
from plora_ray.errors import ConfigError

KEY = "k" * 32


@pytest.fixture
def authenticator(monkeypatch: pytest.MonkeyPatch) -> Authenticator:
    monkeypatch.setenv("PLORA_JWT_KEY", KEY)
    return Authenticator(AuthSettings(algorithm="HS256", issuer="me", audience="plora"))


def authenticate(authenticator: Authenticator, header: str | None) -> Principal:
    return asyncio.run(authenticator.authenticate(header))


def token(key: Any = KEY, algorithm: str = "HS256", headers: dict[str, Any] | None = None, **changes: Any) -> str:
    claims = {"sub": "u1", "exp": time.time() + 60, "iss": "me", "aud": "plora", "scope": "predict adapt", **changes}
    return jwt.encode({name: value for name, value in claims.items() if value is not None}, key, algorithm=algorithm, headers=headers)


def test_a_valid_token_may_act_for_its_own_user_within_its_scopes_only(authenticator: Authenticator) -> None:
    caller = authenticate(authenticator, f"Bearer {token()}")
    caller.require("predict", ["u1", "u1"])
    for scope, users in (("predict", ["u1", "u2"]), ("erase", ["u1"]), ("admin", [])):
        with pytest.raises(Problem) as problem:
            caller.require(scope, users)  # type: ignore[arg-type]
        assert problem.value.status == 403


def test_users_star_may_act_for_anyone_and_scopes_may_be_a_list(authenticator: Authenticator) -> None:
    caller = authenticate(authenticator, f"Bearer {token(users='*', scope=None, scopes=['erase'])}")
    assert caller == Principal(frozenset({"erase"}), None, "u1")
    caller.require("erase", ["anybody"])


@pytest.mark.parametrize(
    "bad",
    [
        {"exp": time.time() - 60},
        {"exp": None},
        {"nbf": time.time() + 3600},
        {"iat": time.time() + 3600},
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


def test_a_key_of_another_type_or_size_than_the_algorithms_does_not_start(tmp_path: Path) -> None:
    curve, short = ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(public_exponent=65537, key_size=1024)
    path = tmp_path / "key.pem"
    for algorithm, key in (("RS256", curve), ("ES256", curve), ("RS256", short), ("ES256", short)):
        path.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
        with pytest.raises(ConfigError, match=f"{algorithm} needs"):
            Authenticator(AuthSettings(algorithm=algorithm, key_file=path))  # type: ignore[arg-type]
    path.write_text(KEY)
    with pytest.raises(ConfigError, match="no public key in PEM form"):
        Authenticator(AuthSettings(algorithm="RS256", key_file=path))


def test_authentication_without_a_usable_key_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PLORA_JWT_KEY", raising=False)
    with pytest.raises(ConfigError, match="PLORA_JWT_KEY"):
        Authenticator(AuthSettings(algorithm="HS256"))
    monkeypatch.setenv("PLORA_JWT_KEY", "short")
    with pytest.raises(ConfigError, match="at least 32"):
        Authenticator(AuthSettings(algorithm="HS256"))


class Issuer:
    """A token issuer's HTTP server of public keys. jwks None: it fails."""

    def __init__(self) -> None:
        self.keys: dict[str, Any] = {}
        self.failing, self.asked = False, 0
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                issuer.asked += 1
                self.send_response(503 if issuer.failing else 200)
                self.end_headers()
                self.wfile.write(b"" if issuer.failing else issuer.jwks().encode())

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/jwks"

    def jwks(self) -> str:
        entries = []
        for kid, key in self.keys.items():
            algorithm = jwt.get_algorithm_by_name("RS256" if isinstance(key, rsa.RSAPrivateKey) else "ES256")
            entries.append({**json.loads(algorithm.to_jwk(key.public_key())), "kid": kid, "use": "sig"})
        return json.dumps({"keys": entries})


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    issuer = Issuer()
    thread = threading.Thread(target=issuer.http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield issuer
    issuer.http.shutdown()
    thread.join()
    issuer.http.server_close()


def refused(authenticator: Authenticator, header: str) -> int:
    with pytest.raises(Problem) as problem:
        authenticate(authenticator, header)
    return problem.value.status


@pytest.mark.parametrize("algorithm", ["RS256", "ES256"])
def test_tokens_are_verified_by_the_issuers_key_of_their_kid_whose_type_must_be_the_algorithms(issuer: Issuer, algorithm: str) -> None:
    private = rsa.generate_private_key(public_exponent=65537, key_size=2048), ec.generate_private_key(ec.SECP256R1())
    right, wrong = private if algorithm == "RS256" else private[::-1]
    other = "ES256" if algorithm == "RS256" else "RS256"
    issuer.keys = {"right": right, "wrong": wrong}
    verifier = Authenticator(AuthSettings(algorithm=algorithm, jwks_url=issuer.url, issuer="me", audience="plora"))  # type: ignore[arg-type]

    def signed(key: Any, algorithm: str, kid: Any, **changes: Any) -> str:
        return f"Bearer {token(key, algorithm, {} if kid is None else {'kid': kid}, **changes)}"

    assert authenticate(verifier, signed(right, algorithm, "right")).user == "u1"
    assert authenticate(verifier, signed(right, algorithm, "right", sub="u2")).user == "u2"
    for bad in (
        signed(right, algorithm, None),
        signed(right, algorithm, "wrong"),
        signed(right, algorithm, "unheard of"),
        signed(wrong, other, "wrong"),
        signed(KEY, "HS256", "right"),
        signed(right, algorithm, "right", iss="other"),
        signed(right, algorithm, "right", aud="other"),
        signed(right, algorithm, "right", exp=time.time() - 60),
        signed(right, algorithm, "right", nbf=time.time() + 3600),
    ):
        assert refused(verifier, bad) == 401
    assert issuer.asked == 1, "made-up kids don't reach the issuer right after it was asked"


def test_a_new_key_is_found_a_silent_issuer_is_believed_for_a_while_and_then_the_answer_is_503(
    issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    issuer.keys, issuer.failing = {"first": first}, True
    verifier = Authenticator(AuthSettings(algorithm="ES256", jwks_url=issuer.url))
    plain = {"iss": None, "aud": None}
    old, new = (f"Bearer {token(key, 'ES256', {'kid': kid}, **plain)}" for kid, key in (("first", first), ("second", second)))
    assert refused(verifier, old) == 503
    monkeypatch.setattr(token_keys, "COOLDOWN_S", 0.0)
    issuer.failing = False
    assert authenticate(verifier, old).user == "u1" and refused(verifier, new) == 401
    issuer.keys = {"second": second}
    assert authenticate(verifier, new).user == "u1" and refused(verifier, old) == 401
    issuer.failing = True
    monkeypatch.setattr(token_keys, "FRESH_S", 0.0)
    assert authenticate(verifier, new).user == "u1"
    monkeypatch.setattr(token_keys, "BELIEVED_S", 0.0)
    assert refused(verifier, new) == 503


def test_a_key_set_may_be_a_file_that_is_read_again_when_a_token_names_a_new_key(
    issuer: Issuer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_keys, "COOLDOWN_S", 0.0)
    file, key = tmp_path / "jwks.json", ec.generate_private_key(ec.SECP256R1())
    settings = AuthSettings(algorithm="ES256", jwks_file=file)
    with pytest.raises(ConfigError, match="jwks_file"):
        Authenticator(settings)
    issuer.keys = {"one": key}
    file.write_text(issuer.jwks())
    verifier = Authenticator(settings)
    issuer.keys = {"two": key}
    file.write_text(issuer.jwks())
    assert authenticate(verifier, f"Bearer {token(key, 'ES256', {'kid': 'two'}, iss=None, aud=None)}").user == "u1"


@pytest.mark.parametrize(
    ("auth", "message"),
    [
        ({"algorithm": "HS256", "jwks_url": "https://x/jwks"}, "HS256 has none"),
        ({"algorithm": "ES256", "jwks_url": "http://issuer/jwks"}, "must begin with https://"),
        ({"algorithm": "ES256", "jwks_url": "https://me:hunter2@issuer/jwks"}, "user name or password"),
        ({"algorithm": "ES256", "jwks_url": "https://x/jwks", "jwks_file": "x"}, "one place"),
    ],
)
def test_keys_come_from_one_safe_place(auth: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        parse_settings({"serving": {"auth": auth}})
    assert "hunter2" not in str(error.value)
