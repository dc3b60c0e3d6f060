"""The JSON that clients send and get. Shapes and types only; limits and rights are checked elsewhere."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr

from plora_ray.errors import InvalidUserId
from plora_ray.identity import validate_user_id


def _user_id(value: str) -> str:
    try:
        return validate_user_id(value)
    except InvalidUserId as error:
        raise ValueError(str(error)) from None


def _text(value: str) -> str:
    if not value.strip():
        raise ValueError("text is empty: give at least one visible character")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("text is not valid Unicode (lone surrogate)") from None
    return value


UserId = Annotated[StrictStr, AfterValidator(_user_id)]
Text = Annotated[StrictStr, AfterValidator(_text)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PredictInput(_Body):
    """One text of one user."""

    user_id: UserId
    text: Text


class PredictRequest(_Body):
    """Texts of any mix of users."""

    inputs: list[PredictInput] = Field(min_length=1)


class Prediction(BaseModel):
    """label: a class name, or a number for a regression; scores: probability by class name.

    personalization: whether the user's own adapter answered; reason: why not, when the store couldn't tell or the guard left
    the user to the population.
    """

    user_id: str
    label: str | float
    scores: dict[str, float]
    personalization: Literal["adapter", "population"]
    generation: str
    reason: str | None = None


class PredictResponse(BaseModel):
    """Predictions in the order of the inputs, all by one generation."""

    predictions: list[Prediction]


class Example(_Body):
    """A text and what this user says of it."""

    text: Text
    label: StrictStr | StrictBool | StrictInt | StrictFloat


class ExamplesRequest(_Body):
    """All examples this user's adapter is fitted on; they replace earlier ones."""

    examples: list[Example] = Field(min_length=1)


class AdaptResponse(BaseModel):
    """The fitted adapter. Losses: mean over the examples, before and after."""

    user_id: str
    examples: int
    generation: str
    loss_before: float
    loss_after: float
    seconds: float


class BroughtResponse(BaseModel):
    """An adapter that was fitted elsewhere and is stored now. generation: the one that answers this user."""

    user_id: str
    generation: str


class SharedDescription(BaseModel):
    """What a device needs to fit an adapter of its own, beside the shared parameters: the generation that answers this user.

    basis: SHA-256 of the shared parameters. model: name and SHA-256 of the weights of the PLM. adapter_config: as in the manifest.
    """

    generation: str
    kind: str
    basis: str
    model: dict[str, str]
    adapter_config: dict[str, Any]


class UserResponse(BaseModel):
    """What is known of a user with an adapter. personalization: population where it is the zero vector, by the training's guard."""

    user_id: str
    personalization: Literal["adapter", "population"]
    generation: str
    examples: int
    updated_at: str


class Generation(BaseModel):
    """A published generation. serving: whether this replica answers with it; current: whether it is the one to serve.

    share: of the users for whom it is tried out, if it is.
    """

    generation: str
    created_at: str
    users: int
    examples: int
    model: str
    current: bool
    serving: bool
    share: float | None = None


class GenerationsResponse(BaseModel):
    """Published generations, oldest first."""

    generations: list[Generation]


class ActivateResponse(BaseModel):
    """The generation that serves now."""

    generation: str


class Health(BaseModel):
    """status: ok."""

    status: Literal["ok"] = "ok"


class CanaryInfo(BaseModel):
    """A generation that answers for a share of the users, beside the current one."""

    generation: str
    share: float


class Readiness(BaseModel):
    """The generations that this replica answers with."""

    status: Literal["ready"] = "ready"
    generation: str
    canary: CanaryInfo | None = None


class InvalidField(BaseModel):
    """Which field of the request is wrong, and why."""

    field: str
    reason: str


class ProblemDocument(BaseModel):
    """An error, as RFC 9457 says."""

    type: Literal["about:blank"] = "about:blank"
    title: str
    status: int
    detail: str
    errors: list[InvalidField] | None = None
