"""The Ray Serve application: `deployments.app:build`, as Serve config files name it. The only file here that defines deployments."""

from __future__ import annotations

import asyncio
import logging
import math
from typing import Any

import torch
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from deployments.auth import Authenticator
from deployments.fitting import FitRequest, FitResult, FittingService
from deployments.metrics import ServingMetrics
from deployments.prediction import PredictionService
from deployments.problems import Problem
from deployments.routes import create_api
from plora_ray.config import ServingSettings, Settings, load_settings, parse_settings
from plora_ray.errors import ConfigError
from plora_ray.opening import UNENCRYPTED

log = logging.getLogger(__name__)

FITS_AT_ONCE = 64
FIT_WAIT_S = 0.01
DRAIN_POLL_S = 0.5
DRAIN_MARGIN_S = 5.0
# Behind HAProxy a replica that goes takes requests for this long, until every HAProxy knows; it is Ray Serve's own time.
DEREGISTRATION_S = 30.0
# Where HAProxy doesn't: a user's requests go to one replica, by the header that cluster/serve_environment.py names.
ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"


def _use_cpus(cpus: float) -> None:
    """As many torch threads as the replica was given CPUs; Ray only counts CPUs, it doesn't enforce them.

    One batch runs at a time and its operators one after the other, so a second pool, for operators side by side, would stay idle.
    """
    torch.set_num_threads(max(1, math.floor(cpus)))
    torch.set_num_interop_threads(1)


@serve.deployment(name="Personalizer", max_ongoing_requests=4 * FITS_AT_ONCE)
class Personalizer:
    """Fits users' adapters; calls that arrive together are fitted together."""

    def __init__(self, settings: dict[str, Any]) -> None:
        parsed = parse_settings(settings)
        _use_cpus(parsed.serving.replica_cpus)
        self._service = FittingService(parsed)

    @serve.batch(max_batch_size=FITS_AT_ONCE, batch_wait_timeout_s=FIT_WAIT_S)
    async def fit(self, requests: list[FitRequest]) -> list[FitResult]:
        """One result a request, in order."""
        return await asyncio.to_thread(self._service.fit, requests)

    def __del__(self) -> None:
        if hasattr(self, "_service"):
            self._service.close()


async def fitted_by(personalizer: DeploymentHandle, request: FitRequest) -> FitResult:
    """The Personalizer's answer. Raises Problem 503 if its replica died over it: then nothing is known to be stored."""
    try:
        result: FitResult = await personalizer.fit.remote(request)
    except RayActorError:
        raise Problem(503, "the adapter was being fitted on a machine that was lost: try again") from None
    return result


def _predictor(settings: Settings) -> Any:
    """The Predictor deployment for these settings: HTTP, batching, cache and model in one process, so that a request makes one hop."""

    def api() -> FastAPI:
        return create_api(settings.serving, lambda: serve.get_replica_context().servable_object.service)

    @serve.deployment(name="Predictor")
    @serve.ingress(api)
    class Predictor:
        def __init__(self, personalizer: DeploymentHandle) -> None:
            logging.getLogger("ray.serve").setLevel(logging.WARNING)  # one line a request is a cost and names nothing useful
            _use_cpus(settings.serving.replica_cpus)

            self.service = PredictionService(settings, lambda request: fitted_by(personalizer, request), ServingMetrics())

        def __del__(self) -> None:
            if hasattr(self, "service"):
                self.service.close()

    return Predictor


def build(args: dict[str, Any]) -> serve.Application:
    """The application. args: {"config": path of the settings file} or {"settings": the tree itself}. Raises ConfigError."""
    settings = _settings(args)
    if not Authenticator(settings.serving.auth).enabled:  # made here too, so that a wrong key is one line and no replica that never starts
        log.warning("AUTHENTICATION IS OFF: whoever reaches this port may read, adapt and erase every user. Set serving.auth.algorithm.")
    if settings.store.encryption is None:
        log.warning(UNENCRYPTED)
    serving = settings.serving
    resources = {"num_cpus": serving.replica_cpus, "num_gpus": serving.replica_gpus}
    personalizer = Personalizer.options(ray_actor_options=resources).bind(settings.model_dump(mode="json"))  # type: ignore[attr-defined]
    predictor = _predictor(settings).options(
        **_replicas(serving), max_ongoing_requests=serving.limits.queued_texts, ray_actor_options=resources,
        graceful_shutdown_wait_loop_s=DRAIN_POLL_S, graceful_shutdown_timeout_s=_drain_s(serving),
        **({"request_router_config": RequestRouterConfig(request_router_class=ROUTER)} if serving.proxy == "serve" else {}),
    )  # fmt: skip
    application: serve.Application = predictor.bind(personalizer)
    return application


def _drain_s(serving: ServingSettings) -> float:
    """How long a replica that goes may take to end what it has: no request may take longer than the last one it takes in."""
    deregistration_s = DEREGISTRATION_S if serving.proxy == "haproxy" else 0.0
    return deregistration_s + serving.request_timeout_s + DRAIN_MARGIN_S


def _replicas(serving: ServingSettings) -> dict[str, Any]:
    """Ray Serve's options for a fixed number of replicas, or for one that follows the requests under way."""
    fewest, most = serving.replica_range
    if fewest == most:
        return {"num_replicas": most}
    # A full batch at work and one that gathers behind it: more than that waits, and another replica helps.
    return {
        "num_replicas": "auto",
        "autoscaling_config": {
            "min_replicas": fewest, "max_replicas": most, "target_ongoing_requests": 2 * serving.batch_rows,
            "upscale_delay_s": serving.scale_up_after_s, "downscale_delay_s": serving.scale_down_after_s,
        },
    }


def _settings(args: dict[str, Any]) -> Settings:
    match args:
        case {"config": str(path), **rest} if not rest:
            return load_settings(path)
        case {"settings": dict(tree), **rest} if not rest:
            return parse_settings(tree)
    raise ConfigError('the application takes one argument: {"config": path of a settings file} or {"settings": {...}}')
