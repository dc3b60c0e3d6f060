"""What one request may ask for, checked before any work is done for it."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.problems import Problem, problem_response
from plora_ray.config import LimitSettings


class BodyLimit:
    """ASGI middleware: bodies over `max_bytes` are answered 413 without being read to the end."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._max_bytes:
            await problem_response(self._too_large())(scope, receive, send)
            return
        # Read here: an error raised inside the application's own reading would come out as a malformed body.
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return  # the client has gone
            body += message.get("body", b"")
            if len(body) > self._max_bytes:
                await problem_response(self._too_large())(scope, receive, send)
                return
            if not message.get("more_body", False):
                break
        pending: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        await self._app(scope, replay, send)

    def _too_large(self) -> Problem:
        return Problem(413, f"the body is larger than the {self._max_bytes:,} bytes this server takes: send fewer texts at a time")


def check_texts(texts: Sequence[str], limits: LimitSettings, *, field: str, most: int) -> None:
    """Raises Problem 413 for more than `most` texts or for one that is too long. field: what the list is called in the body."""
    if len(texts) > most:
        raise Problem(413, f"{field}: {len(texts)} items, at most {most} are taken in one request")
    for place, text in enumerate(texts):
        if len(text) > limits.text_chars:
            reason = f"{len(text):,} characters, at most {limits.text_chars:,} are taken"
            raise Problem(413, f"{field}[{place}].text: {reason}", fields=[(f"{field}[{place}].text", reason)])
