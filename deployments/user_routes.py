"""Routes under /v1 that are about users: predict, adapt, bring an adapter, look at and erase one.

Annotations here are evaluated at once (no postponed evaluation): FastAPI reads them, and some name local types.
"""

from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Depends, Path, Request, Response

from deployments.auth import Principal
from deployments.bringing import MEDIA_TYPE, decode_brought
from deployments.doors import VERSION_HEADER, Doors
from deployments.limits import check_texts
from deployments.prediction import PredictionService
from deployments.problems import Problem, documented
from deployments.schemas import (
    AdaptResponse,
    BroughtResponse,
    ExamplesRequest,
    Prediction,
    PredictRequest,
    PredictResponse,
    UserId,
    UserResponse,
)
from plora_ray.config import ServingSettings

_BINARY_BODY = {"requestBody": {"required": True, "content": {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}}}


def user_routes(settings: ServingSettings, service: Callable[[], PredictionService], doors: Doors) -> APIRouter:
    """Parse, check rights and limits, call the service, shape the answer."""
    router = APIRouter(prefix="/v1", tags=["users"], dependencies=doors.described, responses=documented(401, 403, 413, 422, 429, 503))
    limits = settings.limits
    Caller = Annotated[Principal, Depends(doors.paced_caller)]
    Timeout = Annotated[float | None, Depends(doors.timeout_s)]
    User = Annotated[UserId, Path()]

    @router.post("/predict", response_model_exclude_none=True, responses=documented(400))
    async def predict(
        body: PredictRequest, who: Caller, at_least: Annotated[str, Depends(doors.at_least)], timeout_s: Timeout
    ) -> PredictResponse:
        who.require("predict", (item.user_id for item in body.inputs))
        check_texts([item.text for item in body.inputs], limits, field="inputs", most=limits.inputs)
        answers = await service().predict([(item.user_id, item.text) for item in body.inputs], at_least, timeout_s)
        predictions = [
            Prediction(
                user_id=item.user_id,
                label=answer.prediction.label,
                scores=answer.prediction.scores,
                personalization=answer.personalization,
                generation=answer.generation,
                reason=answer.reason,
            )
            for item, answer in zip(body.inputs, answers, strict=True)
        ]
        return PredictResponse(predictions=predictions)

    @router.put("/users/{user_id:path}/examples", responses=documented(400, 404, 409))  # 404: of a path without an id
    async def adapt(user_id: User, body: ExamplesRequest, who: Caller, timeout_s: Timeout, response: Response) -> AdaptResponse:
        with doors.audited("adapt", who, user_id=user_id) as audited:
            who.require("adapt", [user_id])
            check_texts([item.text for item in body.examples], limits, field="examples", most=limits.examples)
            doors.pace_adaptation(user_id)
            texts, labels = [item.text for item in body.examples], [item.label for item in body.examples]
            adapted = await service().adapt(user_id, texts, labels, timeout_s)
            audited.generation = adapted.generation
        response.headers[VERSION_HEADER] = adapted.version
        return AdaptResponse(
            user_id=user_id, examples=adapted.examples, generation=adapted.generation, loss_before=adapted.loss_before,
            loss_after=adapted.loss_after, seconds=round(adapted.seconds, 4),
        )  # fmt: skip

    @router.put("/users/{user_id:path}/adapter", responses=documented(404, 409), openapi_extra=_BINARY_BODY)
    async def bring(user_id: User, request: Request, who: Caller, response: Response) -> BroughtResponse:
        with doors.audited("bring_adapter", who, user_id=user_id) as audited:
            who.require("adapt", [user_id])
            doors.pace_adaptation(user_id)
            adapter = await service().bring(user_id, decode_brought(await request.body()))
            audited.generation = adapter.generation
        response.headers[VERSION_HEADER] = adapter.version
        return BroughtResponse(user_id=user_id, generation=adapter.generation)

    @router.get("/users/{user_id:path}", responses=documented(404))
    async def user(user_id: User, who: Caller) -> UserResponse:
        who.require("predict", [user_id])
        adapter = await service().user(user_id)
        if adapter is None:
            raise Problem(404, "this user has no adapter: the population answers; PUT examples to personalise")
        return UserResponse(
            user_id=user_id,
            personalization="adapter" if adapter.record.any() else "population",
            generation=adapter.generation,
            examples=adapter.examples,
            updated_at=adapter.updated_at,
        )

    @router.delete("/users/{user_id:path}", status_code=204, responses=documented(404))  # of a path without an id
    async def erase(user_id: User, who: Caller) -> None:
        with doors.audited("erase", who, user_id=user_id):
            who.require("erase", [user_id])
            await service().erase(user_id)

    return router
