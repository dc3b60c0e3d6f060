"""Errors as RFC 9457 problem documents. The one place that maps what can go wrong to HTTP statuses."""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from deployments.schemas import InvalidField, ProblemDocument
from plora_ray.errors import DataError, ErasedDuringFit, InvalidUserId, PloraError, StoreError
from plora_ray.inference.batcher import QueueFull

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_S = 1


class Problem(PloraError):
    """An error with its HTTP status. fields: (which, why) for invalid fields."""

    def __init__(
        self, status: int, detail: str, *, fields: list[tuple[str, str]] | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(detail)
        self.status, self.detail, self.fields, self.headers = status, detail, fields or [], headers or {}


def problem_response(problem: Problem) -> JSONResponse:
    """The document and its headers; 429 and 503 say when to come back."""
    body: dict[str, Any] = {
        "type": "about:blank", "title": HTTPStatus(problem.status).phrase, "status": problem.status, "detail": problem.detail,
    }  # fmt: skip
    if problem.fields:
        body["errors"] = [{"field": field, "reason": reason} for field, reason in problem.fields]
    headers = dict(problem.headers)
    if problem.status in (429, 503):
        headers.setdefault("Retry-After", str(RETRY_AFTER_S))
    return JSONResponse(body, problem.status, headers, MEDIA_TYPE)


def to_problem(error: Exception) -> Problem:
    """What a client is told of `error`; causes inside the server are not described to it."""
    match error:
        case Problem():
            return error
        case QueueFull():
            return Problem(429, str(error))
        case InvalidUserId():
            return Problem(422, str(error), fields=[("user_id", str(error))])
        case DataError():
            return Problem(422, str(error))
        case ErasedDuringFit():  # 409, not 503: a client that tried again by itself would bring an erased user back
            return Problem(409, "this user was erased while the adapter was being fitted; nothing was stored")
        case StoreError():
            return Problem(503, "the adapter store can't be reached just now: try again")
        case TimeoutError():
            return Problem(503, "the answer took longer than this server allows: try again with fewer texts")
        case HTTPException():
            return Problem(error.status_code, str(error.detail), headers=dict(error.headers or {}))
        case _:
            return Problem(500, "the server failed on this request")


def validation_problem(error: RequestValidationError) -> Problem:
    """400 for what isn't JSON, 422 with each wrong field and the reason otherwise. Values aren't repeated."""
    items = error.errors()
    if any(item["type"] == "json_invalid" for item in items):
        return Problem(400, "the body is not valid JSON")
    fields = [(_field(item["loc"]), item["msg"].removeprefix("Value error, ")) for item in items[:20]]
    return Problem(422, f"{fields[0][0]}: {fields[0][1]}", fields=fields)


def _field(location: tuple[Any, ...]) -> str:
    """inputs[3].text for ("body", "inputs", 3, "text")."""
    name = ""
    for part in location[1:] if location and location[0] in ("body", "path", "query", "header") else location:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else str(part)
    return name or "body"


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """How the interface's description shows that a route may answer with these problems."""
    schema = ProblemDocument.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    schema["properties"]["errors"] = {"type": "array", "items": InvalidField.model_json_schema()}
    content = {MEDIA_TYPE: {"schema": schema}}
    return {status: {"description": HTTPStatus(status).phrase, "content": content} for status in statuses}


def install(api: FastAPI) -> None:
    """Make every error of `api` leave as a problem document."""

    async def on_validation(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return problem_response(validation_problem(error))

    async def on_error(_: Request, error: Exception) -> JSONResponse:
        problem = to_problem(error)
        if problem.status >= 500:
            log.error(
                "request failed: %s: %s", type(error).__name__, error if isinstance(error, PloraError) else "see traceback", exc_info=error
            )
        return problem_response(problem)

    api.add_exception_handler(RequestValidationError, on_validation)
    for kind in (PloraError, HTTPException, TimeoutError, Exception):
        api.add_exception_handler(kind, on_error)
