"""The HTTP client, synchronous and asynchronous. Needs httpx only; knows the interface, no models and no Ray.

Sends X-User-Id as a routing hint, retries 429 and 503 as the server asks, and connections that broke; remembers adapter
versions, so that whoever adapted a user sees the new adapter in the next answer, whichever replica gives it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import httpx
from cachetools import LRUCache
from tenacity import AsyncRetrying, RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from plora_ray.errors import PloraError

if TYPE_CHECKING:
    import numpy as np

ATTEMPTS = 5
TIMEOUT_S = 60.0
RETRIED = (429, 503)
VERSION_HEADER = "X-Adapter-Version"
TIMEOUT_HEADER = "X-Request-Timeout-Seconds"
REMEMBERED_USERS = 100_000  # whose adapter versions one client knows; replicas have caught up with older ones long since


class RequestFailed(PloraError):
    """The server refused. status: HTTP status; problem: the RFC 9457 document, as far as it sent one."""

    def __init__(self, response: httpx.Response) -> None:
        try:
            self.problem: dict[str, Any] = response.json()
        except ValueError:
            self.problem = {}
        self.status = response.status_code
        self.retry_after_s = _seconds(response.headers.get("Retry-After"))
        super().__init__(f"{self.status}: {self.problem.get('detail', response.reason_phrase)}")


def _seconds(value: str | None) -> float:
    return float(value) if value is not None and value.isdigit() else 0.0


def _is_worth_another_try(error: BaseException) -> bool:
    """Whether the server asks for it, or the connection broke with the machine behind it: no call does more when it is repeated."""
    if isinstance(error, RequestFailed):
        return error.status in RETRIED
    return isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError)


def _wait(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    backoff = wait_random_exponential(multiplier=0.2, max=10)(state)
    return max(backoff, error.retry_after_s) if isinstance(error, RequestFailed) else backoff


_POLICY: dict[str, Any] = {
    "retry": retry_if_exception(_is_worth_another_try),
    "wait": _wait,
    "stop": stop_after_attempt(ATTEMPTS),
    "reraise": True,
}


class _Requests:
    """What both clients send, and what they remember."""

    def __init__(self, token: str | None, timeout_s: float) -> None:
        self._token, self._timeout_s = token, timeout_s
        self._versions: LRUCache[str, str] = LRUCache(REMEMBERED_USERS)

    def predict(self, inputs: Sequence[tuple[str, str]]) -> dict[str, Any]:
        body = {"inputs": [{"user_id": user_id, "text": text} for user_id, text in inputs]}
        return {"method": "POST", "url": "/v1/predict", "json": body, "headers": self._headers([user_id for user_id, _ in inputs])}

    def adapt(self, user_id: str, examples: Sequence[tuple[str, object]]) -> dict[str, Any]:
        body = {"examples": [{"text": text, "label": label} for text, label in examples]}
        return {"method": "PUT", "url": f"{_user_url(user_id)}/examples", "json": body, "headers": self._headers([user_id])}

    def put_adapter(self, user_id: str, record: np.ndarray, basis: str) -> dict[str, Any]:
        from safetensors.numpy import save  # needed by those only who fit adapters themselves

        headers = {**self._headers([user_id]), "Content-Type": "application/octet-stream"}
        body = save({"record": record.astype("<f4")}, {"basis": basis})
        return {"method": "PUT", "url": f"{_user_url(user_id)}/adapter", "content": body, "headers": headers}

    def user(self, user_id: str, method: str) -> dict[str, Any]:
        return {"method": method, "url": _user_url(user_id), "headers": self._headers([user_id])}

    def plain(self, method: str, url: str) -> dict[str, Any]:
        return {"method": method, "url": url, "headers": self._headers([])}

    def remember(self, user_id: str, response: httpx.Response) -> None:
        if version := response.headers.get(VERSION_HEADER):
            self._versions[user_id] = version

    def forget(self, user_id: str) -> None:
        self._versions.pop(user_id, None)

    def _headers(self, users: Sequence[str]) -> dict[str, str]:
        headers = {TIMEOUT_HEADER: f"{self._timeout_s:g}"}  # nobody waits longer, so nothing need be computed after it
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        if len(set(users)) == 1:
            headers["X-User-Id"] = quote(users[0], safe="")
        if versions := [self._versions[user] for user in users if user in self._versions]:
            headers[VERSION_HEADER] = max(versions)
        return headers


def _user_url(user_id: str) -> str:
    return f"/v1/users/{quote(user_id, safe='')}"


def _shared_url(description: Mapping[str, Any]) -> str:
    return f"/v1/generations/{quote(description['generation'], safe='')}/shared"


def _checked(response: httpx.Response) -> httpx.Response:
    if response.is_error:
        raise RequestFailed(response)
    return response


class Client:
    """`Client("http://127.0.0.1:8000").predict([("u1", "some text")])`. A context manager; raises RequestFailed.

    token: bearer token, where the server asks for one. transport: for tests and special networks, as httpx takes it.
    """

    def __init__(
        self, url: str, *, token: str | None = None, timeout_s: float = TIMEOUT_S, transport: httpx.BaseTransport | None = None
    ) -> None:
        self._requests = _Requests(token, timeout_s)
        self._http = httpx.Client(base_url=url, timeout=timeout_s, transport=transport)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def predict(self, inputs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
        """Predictions for (user_id, text) pairs, in order."""
        predictions: list[dict[str, Any]] = self._send(self._requests.predict(inputs)).json()["predictions"]
        return predictions

    def adapt(self, user_id: str, examples: Sequence[tuple[str, object]]) -> dict[str, Any]:
        """Fit the user's adapter on (text, label) pairs; later calls of this client see it."""
        response = self._send(self._requests.adapt(user_id, examples))
        self._requests.remember(user_id, response)
        return dict(response.json())

    def put_adapter(self, user_id: str, record: np.ndarray, basis: str) -> dict[str, Any]:
        """Bring an adapter fitted elsewhere, float32 [width]. basis: SHA-256 of the shared parameters it was fitted with."""
        response = self._send(self._requests.put_adapter(user_id, record, basis))
        self._requests.remember(user_id, response)
        return dict(response.json())

    def shared(self, user_id: str) -> tuple[dict[str, Any], bytes]:
        """What a device needs to fit this user's adapter itself: description and shared parameters, for `open_shared`."""
        description = dict(self._send(self._requests.plain("GET", f"/v1/shared/{quote(user_id, safe='')}")).json())
        return description, self._send(self._requests.plain("GET", _shared_url(description))).content

    def user(self, user_id: str) -> dict[str, Any]:
        """What the server knows of a user's adapter; RequestFailed 404 if there is none."""
        return dict(self._send(self._requests.user(user_id, "GET")).json())

    def erase(self, user_id: str) -> None:
        """Erase the user everywhere."""
        self._send(self._requests.user(user_id, "DELETE"))
        self._requests.forget(user_id)

    def generations(self) -> list[dict[str, Any]]:
        """Published generations, oldest first."""
        generations: list[dict[str, Any]] = self._send(self._requests.plain("GET", "/v1/generations")).json()["generations"]
        return generations

    def activate(self, generation: str) -> Mapping[str, Any]:
        """Make a generation serve."""
        return dict(self._send(self._requests.plain("POST", f"/v1/generations/{quote(generation, safe='')}/activate")).json())

    def ready(self) -> bool:
        """Whether the server answers with a generation; False also while it can't be reached."""
        try:
            return self._http.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def _send(self, request: dict[str, Any]) -> httpx.Response:
        for attempt in Retrying(**_POLICY):
            with attempt:
                return _checked(self._http.request(**request))
        raise AssertionError("tenacity re-raises the last failure")


class AsyncClient:
    """The same calls, awaited."""

    def __init__(
        self, url: str, *, token: str | None = None, timeout_s: float = TIMEOUT_S, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        self._requests = _Requests(token, timeout_s)
        self._http = httpx.AsyncClient(base_url=url, timeout=timeout_s, transport=transport)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def predict(self, inputs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
        """Predictions for (user_id, text) pairs, in order."""
        predictions: list[dict[str, Any]] = (await self._send(self._requests.predict(inputs))).json()["predictions"]
        return predictions

    async def adapt(self, user_id: str, examples: Sequence[tuple[str, object]]) -> dict[str, Any]:
        """Fit the user's adapter on (text, label) pairs; later calls of this client see it."""
        response = await self._send(self._requests.adapt(user_id, examples))
        self._requests.remember(user_id, response)
        return dict(response.json())

    async def put_adapter(self, user_id: str, record: np.ndarray, basis: str) -> dict[str, Any]:
        """Bring an adapter fitted elsewhere, float32 [width]. basis: SHA-256 of the shared parameters it was fitted with."""
        response = await self._send(self._requests.put_adapter(user_id, record, basis))
        self._requests.remember(user_id, response)
        return dict(response.json())

    async def shared(self, user_id: str) -> tuple[dict[str, Any], bytes]:
        """What a device needs to fit this user's adapter itself: description and shared parameters, for `open_shared`."""
        description = dict((await self._send(self._requests.plain("GET", f"/v1/shared/{quote(user_id, safe='')}"))).json())
        return description, (await self._send(self._requests.plain("GET", _shared_url(description)))).content

    async def user(self, user_id: str) -> dict[str, Any]:
        """What the server knows of a user's adapter; RequestFailed 404 if there is none."""
        return dict((await self._send(self._requests.user(user_id, "GET"))).json())

    async def erase(self, user_id: str) -> None:
        """Erase the user everywhere."""
        await self._send(self._requests.user(user_id, "DELETE"))
        self._requests.forget(user_id)

    async def _send(self, request: dict[str, Any]) -> httpx.Response:
        async for attempt in AsyncRetrying(**_POLICY):
            with attempt:
                return _checked(await self._http.request(**request))
        raise AssertionError("tenacity re-raises the last failure")
