"""The HTTP interface, put together: errors as problem documents, the body limit, and each group of routes.

Annotations here are evaluated at once (no postponed evaluation): FastAPI reads them.
"""

from collections.abc import Callable

from fastapi import APIRouter, FastAPI

from deployments import problems
from deployments.doors import Doors
from deployments.generation_routes import generation_routes
from deployments.limits import BodyLimit
from deployments.open_inference import open_inference_routes
from deployments.prediction import PredictionService
from deployments.problems import Problem, documented
from deployments.schemas import CanaryInfo, Health, Readiness
from deployments.shared_routes import shared_routes
from deployments.user_routes import user_routes
from plora_ray.config import ServingSettings

ServiceProvider = Callable[[], PredictionService]


def create_api(settings: ServingSettings, service: ServiceProvider) -> FastAPI:
    """The whole HTTP application. service: gives the replica's service at each call. Raises ConfigError for unusable keys."""
    doors = Doors(settings, service)
    api = FastAPI(title="plora-ray", summary="Every request its own user's model.", version="1")
    problems.install(api)
    api.add_middleware(BodyLimit, max_bytes=settings.limits.body_bytes)
    api.include_router(_health_routes(service))
    api.include_router(user_routes(settings, service, doors))
    api.include_router(shared_routes(settings, service, doors))
    api.include_router(generation_routes(service, doors))
    api.include_router(open_inference_routes(settings, service, doors))
    return api


def _health_routes(service: ServiceProvider) -> APIRouter:
    router = APIRouter(tags=["health"], responses=documented(413))

    @router.get("/healthz")
    async def live() -> Health:
        return Health()

    @router.get("/readyz", response_model_exclude_none=True, responses=documented(503))
    async def ready() -> Readiness:
        if not service().ready:
            raise Problem(503, "no generation is loaded yet: publish one with train-all")
        serving = service().serving
        canary = None if serving.canary is None else CanaryInfo(generation=serving.canary.generation, share=serving.canary.share)
        return Readiness(generation=serving.current.name, canary=canary)

    return router
