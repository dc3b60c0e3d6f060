"""Routes by which a device gets what it needs to fit an adapter itself, so that texts never leave it.

Annotations here are evaluated at once (no postponed evaluation): FastAPI reads them, and some name local types.
"""

from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Response

from deployments.auth import Principal
from deployments.bringing import MEDIA_TYPE
from deployments.doors import Doors
from deployments.prediction import PredictionService
from deployments.problems import Problem, documented
from deployments.schemas import SharedDescription, UserId
from plora_ray.config import ServingSettings

_BYTES = {"description": "shared.safetensors", "content": {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}}


def shared_routes(settings: ServingSettings, service: Callable[[], PredictionService], doors: Doors) -> APIRouter:
    """Scope adapt, and only with serving.give_shared: these parameters were trained on everybody's rows."""
    router = APIRouter(
        prefix="/v1", tags=["devices"], dependencies=doors.described, responses=documented(401, 403, 404, 413, 422, 429, 503)
    )
    Caller = Annotated[Principal, Depends(doors.paced_caller)]

    def given() -> None:
        if not settings.give_shared:
            raise Problem(403, "this server doesn't hand out shared parameters (serving.give_shared)")

    @router.get("/shared/{user_id:path}")
    async def description(user_id: Annotated[UserId, Path()], who: Caller) -> SharedDescription:
        who.require("adapt", [user_id])
        given()
        reader = service().serving_user(user_id).loaded.reader
        manifest = reader.manifest
        return SharedDescription(
            generation=manifest.generation, kind=manifest.kind, basis=reader.basis, model=manifest.model.model_dump(),
            adapter_config=manifest.adapter_config,
        )  # fmt: skip

    @router.get("/generations/{generation}/shared", response_class=Response, responses={200: _BYTES})
    async def shared(generation: str, who: Caller) -> Response:
        who.require("adapt")
        given()
        basis, data = await service().shared(generation)
        return Response(data, media_type=MEDIA_TYPE, headers={"ETag": f'"{basis}"', "Cache-Control": "private, immutable"})

    return router
