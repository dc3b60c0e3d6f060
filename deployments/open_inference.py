"""The Open Inference Protocol (v2) beside the system's own interface: string tensors `text` and `user_id` in, labels out.

Annotations here are evaluated at once (no postponed evaluation): FastAPI reads them, and some name local types.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deployments.auth import Principal
from deployments.doors import Doors
from deployments.limits import check_texts
from deployments.prediction import PredictionService
from deployments.problems import Problem, documented
from deployments.schemas import PredictInput
from plora_ray import __version__
from plora_ray.config import ServingSettings
from plora_ray.inference import Answer


class RequestTensor(BaseModel):
    """A string tensor of one value a row; data may be nested as its shape says."""

    model_config = ConfigDict(extra="ignore")

    name: str
    shape: list[Annotated[int, Field(ge=0)]]
    datatype: Literal["BYTES"]
    data: list[Any]

    def values(self) -> list[Any]:
        """The elements in row-major order. Raises Problem 422 if there are more or fewer than the shape says."""
        flat: list[Any] = []
        for item in self.data:
            flat.extend(item) if isinstance(item, list) else flat.append(item)
        count = 1
        for size in self.shape:
            count *= size
        if len(flat) != count:
            raise Problem(422, f"tensor '{self.name}' has {len(flat)} elements, its shape {self.shape} says {count}")
        return flat


class InferRequest(BaseModel):
    """An inference request; what it doesn't name here is accepted and ignored, as the protocol asks."""

    model_config = ConfigDict(extra="ignore")

    id: str | None = None
    inputs: list[RequestTensor] = Field(min_length=1)


def open_inference_routes(settings: ServingSettings, service: Callable[[], PredictionService], doors: Doors) -> APIRouter:
    """Routes under /v2."""
    router = APIRouter(prefix="/v2", tags=["open inference protocol"], responses=documented(413))
    Caller = Annotated[Principal, Depends(doors.paced_caller)]
    Name = Annotated[str, Path(json_schema_extra={"enum": [settings.model_name]})]

    def known(name: str) -> None:
        if name != settings.model_name:
            raise Problem(404, f"the only model here is '{settings.model_name}'")

    @router.get("")
    async def server() -> dict[str, Any]:
        return {"name": "plora-ray", "version": __version__, "extensions": []}

    @router.get("/health/live")
    async def live() -> dict[str, bool]:
        return {"live": True}

    @router.get("/health/ready", responses=documented(503))
    async def ready() -> dict[str, bool]:
        if not service().ready:
            raise Problem(503, "no generation is loaded yet")
        return {"ready": True}

    @router.get("/models/{name}", responses=documented(404, 422))
    async def model(name: Name) -> dict[str, Any]:
        known(name)
        tensor = {"datatype": "BYTES", "shape": [-1]}
        return {
            "name": name,
            "versions": [service().serving.current.name] if service().ready else [],
            "platform": "plora",
            "inputs": [{"name": "text", **tensor}, {"name": "user_id", **tensor}],
            "outputs": [
                {"name": "label", **tensor},
                {"name": "scores", "datatype": "FP64", "shape": [-1, -1]},
                {"name": "personalization", **tensor},
            ],
        }

    @router.get("/models/{name}/ready", responses=documented(404, 422, 503))
    async def model_ready(name: Name) -> dict[str, Any]:
        known(name)
        if not service().ready:
            raise Problem(503, "no generation is loaded yet")
        return {"name": name, "ready": True}

    @router.post("/models/{name}/infer", dependencies=doors.described, responses=documented(400, 401, 403, 404, 422, 429, 503))
    async def infer(
        name: Name, body: InferRequest, who: Caller, at_least: Annotated[str, Depends(doors.at_least)],
        timeout_s: Annotated[float | None, Depends(doors.timeout_s)],
    ) -> dict[str, Any]:  # fmt: skip
        known(name)
        rows = _rows(body)
        who.require("predict", (row.user_id for row in rows))
        check_texts([row.text for row in rows], settings.limits, field="inputs", most=settings.limits.inputs)
        answers = await service().predict([(row.user_id, row.text) for row in rows], at_least, timeout_s)
        return _response(name, body.id, answers)

    return router


def _rows(body: InferRequest) -> list[PredictInput]:
    tensors = {tensor.name: tensor.values() for tensor in body.inputs}
    missing = {"text", "user_id"} - tensors.keys()
    if missing:
        raise Problem(422, f"inputs: there is no tensor '{sorted(missing)[0]}'; send 'text' and 'user_id'")
    if len(tensors["text"]) != len(tensors["user_id"]) or not tensors["text"]:
        raise Problem(422, "inputs: 'text' and 'user_id' must have the same number of elements, at least one")
    rows = []
    for place, (user_id, text) in enumerate(zip(tensors["user_id"], tensors["text"], strict=True)):
        try:
            rows.append(PredictInput(user_id=user_id, text=text))
        except ValidationError as error:
            first = error.errors()[0]
            field = f"{first['loc'][0]}[{place}]"
            reason = first["msg"].removeprefix("Value error, ")
            raise Problem(422, f"{field}: {reason}", fields=[(field, reason)]) from None
    return rows


def _response(name: str, request_id: str | None, answers: list[Answer]) -> dict[str, Any]:
    count = len(answers)
    classes = list(answers[0].prediction.scores)
    outputs: list[dict[str, Any]] = [
        {"name": "label", "datatype": "BYTES", "shape": [count], "data": [str(answer.prediction.label) for answer in answers]},
        {"name": "personalization", "datatype": "BYTES", "shape": [count], "data": [answer.personalization for answer in answers]},
    ]
    if classes:
        scores = [score for answer in answers for score in answer.prediction.scores.values()]
        outputs.insert(
            1,
            {
                "name": "scores",
                "datatype": "FP64",
                "shape": [count, len(classes)],
                "data": scores,
                "parameters": {"classes": ",".join(classes)},
            },
        )
    response = {"model_name": name, "model_version": answers[0].generation, "outputs": outputs}
    return response if request_id is None else {**response, "id": request_id}
