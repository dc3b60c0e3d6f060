"""The whole tree of settings, and what it means to those who read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, model_validator

from plora_ray.adapters.adam import AdamSteps
from plora_ray.adapters.inject import Kind
from plora_ray.adapters.model import AdapterSpec
from plora_ray.adapters.solver import Solver, UserFit
from plora_ray.config.evaluation import EvaluationSettings
from plora_ray.config.model import AdapterSettings, ModelSettings, StoreSettings
from plora_ray.config.section import Section
from plora_ray.config.serving import ServingSettings
from plora_ray.config.training import AdamSettings, TrainingSettings
from plora_ray.data.source_settings import SourceSettings

# A vector has few numbers, each of which must go far; matrices have thousands and soon know few rows by heart.
ADAM_LEARNING_RATES: dict[Kind, float] = {"plora": 2e-2, "lora": 3e-4}
ADAM_EPOCHS: dict[Kind, int] = {"plora": 10, "lora": 3}


class Settings(Section):
    """The whole tree, as a YAML file gives it."""

    task: Literal["classification", "regression"] = "classification"
    model: ModelSettings = ModelSettings()
    adapter: AdapterSettings = AdapterSettings()
    data: SourceSettings = SourceSettings(source="synthetic://")
    training: TrainingSettings = TrainingSettings()
    store: StoreSettings = StoreSettings()
    serving: ServingSettings = ServingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()

    @model_validator(mode="after")
    def _batches_hold_a_text(self) -> Settings:
        longest = self.model.max_length
        for name, tokens in (("training", self.training.batch_tokens), ("serving", self.serving.batch_tokens)):
            if tokens < longest:
                raise ValueError(f"{name}.batch_tokens is {tokens}: it must be at least model.max_length ({longest})")
        return self

    @model_validator(mode="after")
    def _settings_fit_the_kind(self) -> Settings:
        kind, solver = self.adapter.kind, self.user_solver
        if kind == "lora" and solver == "newton":
            raise ValueError("training.user_solver newton fits vectors only: with adapter.kind lora set it to adam or auto")
        if kind == "lora" and self.training.mutual_information.weight:
            raise ValueError("training.mutual_information needs user vectors in the population stage: remove it with adapter.kind lora")
        for where, section, names, wanted in (
            ("adapter", self.adapter, ("user_dim", "head_terms"), kind == "plora"),
            ("training", self.training, ("user_dropout", "user_learning_rate", "user_weight_decay"), kind == "plora"),
            ("training.adam", self.training.adam, ("pull",), kind == "lora"),
        ):
            if not wanted and (changed := _changed(section, names)):
                raise ValueError(f"{where}.{changed} means nothing with adapter.kind {kind}: remove it")
        if self.adapter.top_layers is None and (changed := _changed(self.training, ("activation_cache_mb", "activation_disk_mb"))):
            raise ValueError(f"training.{changed} means nothing without adapter.top_layers: remove it or set that")
        if solver == "adam" and self.training.guard:
            raise ValueError("training.guard means nothing to training.user_solver adam, which keeps a user's best epoch: remove it")
        if solver == "newton" and (changed := _changed(self.training.adam, tuple(AdamSettings.model_fields))):
            raise ValueError(f"training.adam.{changed} means nothing to training.user_solver newton: remove it or set user_solver to adam")
        return self

    @model_validator(mode="after")
    def _costs_are_of_classes(self) -> Settings:
        if self.task == "regression" and self.evaluation.cost_matrix is not None:
            raise ValueError("evaluation.cost_matrix is for classes, and task is regression: remove it")
        return self

    @property
    def user_solver(self) -> Solver:
        """What fits users, with `auto` resolved."""
        if self.training.user_solver != "auto":
            return self.training.user_solver
        return "adam" if self.adapter.kind == "lora" else "newton"

    def published(self) -> dict[str, Any]:
        """What reports and trackers show of the tree, as plain values: what shaped the result, and nothing that may hold a credential."""
        values = self.model_dump(mode="json", exclude={"serving": True, "data": {"storage_options"}, "training": {"mlflow"}})
        values["data"]["source"] = self.data.shown
        return values

    def for_ranks(self) -> dict[str, Any]:
        """What training's ranks get, as plain values. They read partitions, never the source, whose address may hold a credential."""
        return self.model_dump(mode="json", exclude={"data": True, "training": {"mlflow"}})

    def user_fit(self) -> UserFit:
        """How users are fitted, here and in few-shot fits of the generation."""
        adam = self.training.adam
        rate, epochs = adam.learning_rate or ADAM_LEARNING_RATES[self.adapter.kind], adam.epochs or ADAM_EPOCHS[self.adapter.kind]
        steps = AdamSteps(epochs=epochs, learning_rate=rate, rows_per_step=adam.rows_per_step, patience=adam.patience)
        return UserFit(self.user_solver, steps, adam.pull, self.training.guard)

    def adapter_spec(self, outputs: int) -> AdapterSpec:
        """The personalised model's shapes for `outputs` classes (1 for a regression)."""
        return AdapterSpec(model=self.model.name, task=self.task, outputs=outputs, pooling=self.model.pooling, **self.adapter.model_dump())


def _changed(section: BaseModel, names: Sequence[str]) -> str | None:
    """The first of `names` whose value isn't the default."""
    fields, given = type(section).model_fields, vars(section)
    defaults = {name: fields[name].get_default(call_default_factory=True, validated_data=given) for name in names}
    return next((name for name in names if given[name] != defaults[name]), None)
