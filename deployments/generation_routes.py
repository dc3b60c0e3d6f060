"""Routes under /v1/generations: what is published, what a device needs to fit an adapter, and which generation serves.

Annotations here are evaluated at once (no postponed evaluation): FastAPI reads them, and some name local types.
"""

from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Depends

from deployments.auth import Principal
from deployments.doors import Doors
from deployments.prediction import PredictionService
from deployments.problems import documented
from deployments.schemas import ActivateResponse, Generation, GenerationsResponse


def generation_routes(service: Callable[[], PredictionService], doors: Doors) -> APIRouter:
    """For operators (scope admin), whose calls no rate limits."""
    router = APIRouter(
        prefix="/v1/generations", tags=["generations"], dependencies=doors.described, responses=documented(401, 403, 413, 503)
    )
    Caller = Annotated[Principal, Depends(doors.caller)]

    @router.get("", response_model_exclude_none=True)
    async def generations(who: Caller) -> GenerationsResponse:
        who.require("admin")
        serving = service().serving if service().ready else None
        names = [] if serving is None else [served.name for served in serving.all]
        canary = None if serving is None else serving.canary
        listed = [
            Generation(
                generation=info.generation, created_at=info.created_at, users=info.users, examples=info.examples, model=info.model,
                current=info.is_current, serving=info.generation in names,
                share=canary.share if canary is not None and canary.generation == info.generation else None,
            )
            for info in await service().generations()
        ]  # fmt: skip
        return GenerationsResponse(generations=listed)

    @router.post("/{generation}/activate", responses=documented(404, 422))
    async def activate(generation: str, who: Caller) -> ActivateResponse:
        with doors.audited("activate", who) as audited:
            who.require("admin")
            await service().activate(generation)
            audited.generation = generation
        return ActivateResponse(generation=generation)

    return router
