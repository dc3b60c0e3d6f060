"""The HTTP application in the test's own process, without Ray: the same routes, service and fits, over a real store."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jwt
from fastapi import FastAPI
from fastapi.testclient import TestClient

from deployments.fitting import FitRequest, FitResult, FittingService
from deployments.prediction import PredictionService
from deployments.routes import create_api
from plora_ray.config import parse_settings
from plora_ray.store import AdapterStore

KEY = "a test key of more than 32 bytes ......"


def bearer(scope: str = "predict adapt erase admin", user: str = "service", **claims: Any) -> dict[str, str]:
    """The Authorization header of a token."""
    claims = {"sub": user, "exp": time.time() + 3600, "scope": scope, **claims}
    return {"Authorization": f"Bearer {jwt.encode(claims, KEY, algorithm='HS256')}"}


@dataclass
class Application:
    api: FastAPI
    http: TestClient
    service: PredictionService
    fits: FittingService


@contextmanager
def application(store: AdapterStore, plm: str, serving: dict[str, Any]) -> Iterator[Application]:
    """The application with these serving settings. It looks at the store when `service` is told to, not by itself."""
    settings = parse_settings(
        {
            "model": {"name": plm, "max_length": 32},
            "store": {"uri": store.uri},
            "serving": {"refresh_s": 3600, "batch_wait_ms": 0, **serving},
        }
    )
    fits = FittingService(settings)

    async def fit(request: FitRequest) -> FitResult:
        return (await asyncio.to_thread(fits.fit, [request]))[0]

    service = PredictionService(settings, fit)
    api = create_api(settings.serving, lambda: service)
    try:
        with TestClient(api, raise_server_exceptions=False) as http:
            yield Application(api, http, service, fits)
    finally:
        service.close()
        fits.close()


def ask(application: Application, rows: list[tuple[str, str]], headers: dict[str, str] | None = None) -> Any:
    """The answer to POST /v1/predict."""
    body = {"inputs": [{"user_id": user, "text": text} for user, text in rows]}
    return application.http.post("/v1/predict", json=body, headers=headers)


def scores(answer: Any) -> list[list[float]]:
    """Each row's scores, in the order of the classes."""
    return [list(prediction["scores"].values()) for prediction in answer.json()["predictions"]]
