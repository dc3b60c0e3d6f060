"""The HTTP interface, version 1: parse, check rights and limits, call the service, shape the answer.

Annotations here are evaluated at once (no postponed evaluation): FastAPI reads them, and some name local types.
"""

from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, Header, Path, Response

from deployments import problems
from deployments.auth import Authenticator, Principal
from deployments.limits import BodyLimit, check_texts
from deployments.open_inference import open_inference_routes
from deployments.prediction import PredictionService
from deployments.problems import Problem
from deployments.schemas import (
    ActivateResponse,
    AdaptResponse,
    ExamplesRequest,
    Generation,
    GenerationsResponse,
    Health,
    Prediction,
    PredictRequest,
    PredictResponse,
    Readiness,
    UserId,
    UserResponse,
)
from plora_ray.config import ServingSettings
from plora_ray.store import is_version

VERSION_HEADER = "X-Adapter-Version"
ServiceProvider = Callable[[], PredictionService]


def adapter_version(value: Annotated[str | None, Header(alias=VERSION_HEADER)] = None) -> str:
    """The version token a client echoes; empty for none. Raises Problem 422 if it isn't one."""
    if value is not None and not is_version(value):
        raise Problem(422, f"{VERSION_HEADER}: not a version token", fields=[(VERSION_HEADER, "send back what an earlier answer gave")])
    return value or ""


def create_api(settings: ServingSettings, service: ServiceProvider) -> FastAPI:
    """The whole HTTP application. service: gives the replica's service at each call. Raises ConfigError for unusable keys."""
    authenticator = Authenticator(settings.auth)

    def caller(authorization: Annotated[str | None, Header()] = None) -> Principal:
        return authenticator.authenticate(authorization)

    api = FastAPI(title="plora-ray", summary="Every request its own user's model.", version="1")
    problems.install(api)
    api.add_middleware(BodyLimit, max_bytes=settings.limits.body_bytes)
    api.include_router(_health_routes(service))
    api.include_router(_prediction_routes(settings, service, caller))
    api.include_router(_generation_routes(service, caller))
    api.include_router(open_inference_routes(settings, service, caller, adapter_version))
    return api


def _health_routes(service: ServiceProvider) -> APIRouter:
    router = APIRouter(tags=["health"])

    @router.get("/healthz")
    async def live() -> Health:
        return Health()

    @router.get("/readyz")
    async def ready() -> Readiness:
        if not service().ready:
            raise Problem(503, "no generation is loaded yet: publish one with train-all")
        return Readiness(generation=service().loaded.name)

    return router


def _prediction_routes(settings: ServingSettings, service: ServiceProvider, caller: Callable[..., Principal]) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["users"])
    limits = settings.limits
    Caller = Annotated[Principal, Depends(caller)]
    User = Annotated[UserId, Path()]

    @router.post("/predict", response_model_exclude_none=True)
    async def predict(body: PredictRequest, who: Caller, at_least: Annotated[str, Depends(adapter_version)]) -> PredictResponse:
        who.require("predict", (item.user_id for item in body.inputs))
        check_texts([item.text for item in body.inputs], limits, field="inputs", most=limits.inputs)
        answers = await service().predict([(item.user_id, item.text) for item in body.inputs], at_least)
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

    @router.put("/users/{user_id:path}/examples")
    async def adapt(user_id: User, body: ExamplesRequest, who: Caller, response: Response) -> AdaptResponse:
        who.require("adapt", [user_id])
        check_texts([item.text for item in body.examples], limits, field="examples", most=limits.examples)
        adapted = await service().adapt(user_id, [item.text for item in body.examples], [item.label for item in body.examples])
        response.headers[VERSION_HEADER] = adapted.version
        return AdaptResponse(
            user_id=user_id, examples=adapted.examples, generation=adapted.generation, loss_before=adapted.loss_before,
            loss_after=adapted.loss_after, seconds=round(adapted.seconds, 4),
        )  # fmt: skip

    @router.get("/users/{user_id:path}")
    async def user(user_id: User, who: Caller) -> UserResponse:
        who.require("predict", [user_id])
        adapter = await service().user(user_id)
        if adapter is None:
            raise Problem(404, "this user has no adapter: the population answers; PUT examples to personalise")
        return UserResponse(
            user_id=user_id,
            personalization="adapter",
            generation=adapter.generation,
            examples=adapter.examples,
            updated_at=adapter.updated_at,
        )

    @router.delete("/users/{user_id:path}", status_code=204)
    async def erase(user_id: User, who: Caller) -> None:
        who.require("erase", [user_id])
        await service().erase(user_id)

    return router


def _generation_routes(service: ServiceProvider, caller: Callable[..., Principal]) -> APIRouter:
    router = APIRouter(prefix="/v1/generations", tags=["generations"])
    Caller = Annotated[Principal, Depends(caller)]

    @router.get("")
    async def generations(who: Caller) -> GenerationsResponse:
        who.require("admin")
        serving = service().loaded.name if service().ready else None
        listed = [
            Generation(
                generation=info.generation, created_at=info.created_at, users=info.users, examples=info.examples, model=info.model,
                current=info.is_current, serving=info.generation == serving,
            )
            for info in await service().generations()
        ]  # fmt: skip
        return GenerationsResponse(generations=listed)

    @router.post("/{generation}/activate")
    async def activate(generation: str, who: Caller) -> ActivateResponse:
        who.require("admin")
        await service().activate(generation)
        return ActivateResponse(generation=generation)

    return router
