"""A small world to evaluate: a random tiny BERT, users whose labels follow from known vectors, and a generation that holds half of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from plora_ray.adapters.fit import UserPrior
from plora_ray.adapters.labels import LabelSpace
from plora_ray.adapters.model import AdapterSpec, PersonalizedModel
from plora_ray.adapters.pretrained import load_tokenizer, weight_hash
from plora_ray.config import Settings, parse_settings
from plora_ray.store import AdapterStore, ModelRef

WORDS = [f"word{number}" for number in range(24)]
USER_DIM = 4
USERS_PER_COHORT = 24
TRAIN_ROWS, TEST_ROWS = 9, 8


@pytest.fixture(autouse=True)
def no_outside_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PLORA_STORE_KEY", raising=False)


@dataclass(frozen=True)
class World:
    """settings: of an evaluation of the store on the data. secrets: strings that no report may hold."""

    settings: Settings
    store: AdapterStore
    data: Path
    secrets: list[str]
    users_per_cohort: int = USERS_PER_COHORT
    train_rows: int = TRAIN_ROWS
    test_rows: int = TEST_ROWS

    def with_data(self, **values: object) -> Settings:
        return self.settings.model_copy(update={"data": self.settings.data.model_copy(update=values)})

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.data.read_text().splitlines()]

    def with_rows(self, rows: list[dict[str, Any]], file: Path, **values: object) -> Settings:
        """Settings for other rows, which are written to `file`."""
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return self.with_data(source=str(file), **values)

    def with_validation_rows(self, folder: Path) -> tuple[Settings, list[dict[str, Any]]]:
        """Settings for a copy of the data in `folder` where two of three training rows are validation rows, and its rows."""
        watched = [
            {**row, "split": "validation"} if place % 3 and row["split"] == "train" else row for place, row in enumerate(self.rows())
        ]
        return self.with_rows(watched, folder / "rows.jsonl"), watched


def save_tiny_bert(folder: Path) -> Path:
    torch.manual_seed(0)
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=32,
    )  # fmt: skip
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    tokenizer.save_pretrained(folder)
    return folder


def _informative_model(spec: AdapterSpec, texts: list[str]) -> PersonalizedModel:
    """A model in which the user matters: without him the texts' logits lie around zero, and he moves them by as much as they differ."""
    model = PersonalizedModel.from_pretrained(spec)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.shared_parameters().items():
            if name != "head.bias":
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (2.0 if name == "head.weight" else 0.5))
    model.eval()
    with torch.no_grad():
        population = model(*_encoded(spec, texts))
        scale = 3.0 / population.std(dim=0).mean()
        model.head.weight.mul_(scale)
        model.head.bias.sub_(population.mean(dim=0)).mul_(scale)
    return model


def _encoded(spec: AdapterSpec, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    encoded = load_tokenizer(spec.model)(texts, return_tensors="pt", padding=True)
    return encoded["input_ids"], encoded["attention_mask"]


@pytest.fixture(scope="session")
def build_world(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], World]:
    def build(task: str) -> World:
        folder = tmp_path_factory.mktemp(task)
        bert = save_tiny_bert(folder / "bert")
        classes = ("no", "yes") if task == "classification" else ()
        labels = LabelSpace(task, classes, mean=3.0 if not classes else 0.0, std=2.0 if not classes else 1.0)  # type: ignore[arg-type]
        spec = AdapterSpec(model=str(bert), task=labels.task, outputs=labels.outputs, rank=4, alpha=8.0, user_dim=USER_DIM)
        generator = np.random.default_rng(2)
        users = [f"{cohort}-person-{number}" for cohort in "ab" for number in range(USERS_PER_COHORT)]
        vectors = {user: generator.normal(size=USER_DIM).astype(np.float32) for user in users}
        texts = [" ".join(generator.choice(WORDS, 5)) for _ in range(60)]
        model = _informative_model(spec, texts)
        rows = _rows(model, labels, vectors, texts, generator)
        data = folder / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        store = AdapterStore(f"file://{folder}/store")
        _publish(store, model, labels, {user: vector for user, vector in vectors.items() if user.startswith("a-")})
        settings = parse_settings(
            {"task": task, "model": {"name": str(bert), "max_length": 16}, "data": {"source": str(data)}, "store": {"uri": store.uri}}
        )
        return World(settings, store, data, [*vectors, *texts])

    return build


def _rows(
    model: PersonalizedModel, labels: LabelSpace, vectors: dict[str, np.ndarray], texts: list[str], generator: np.random.Generator
) -> list[dict[str, object]]:
    """Every user's answers to texts of his own choice, as the model with his true vector gives them."""
    input_ids, mask = _encoded(model.spec, texts)
    rows: list[dict[str, object]] = []
    for user, vector in vectors.items():
        with torch.no_grad():
            logits = model(input_ids, mask, torch.from_numpy(vector).expand(len(texts), -1))
        answers = [prediction.label for prediction in labels.decode(logits)]
        chosen = generator.choice(len(texts), TRAIN_ROWS + TEST_ROWS, replace=False)
        for place, text in enumerate(chosen):
            split = "train" if place < TRAIN_ROWS else "test"
            rows.append({"user_id": user, "text": texts[text], "label": answers[text], "split": split, "cohort": user[0]})
    return rows


def _publish(store: AdapterStore, model: PersonalizedModel, labels: LabelSpace, vectors: dict[str, np.ndarray]) -> None:
    prior = UserPrior(torch.zeros(USER_DIM, dtype=torch.float64), torch.eye(USER_DIM, dtype=torch.float64), noise_variance=0.01)
    shared = {name: parameter.detach() for name, parameter in model.shared_parameters().items()}
    writer = store.begin("g1")
    writer.write_shared({**shared, **prior.tensors()}, {})
    users = sorted((store.key(user), vector) for user, vector in vectors.items())
    keys = np.frombuffer(b"".join(key for key, _ in users), np.uint8).reshape(-1, 16)
    writer.write_segment(0, keys, np.stack([vector for _, vector in users]), np.full(len(users), TRAIN_ROWS))
    writer.commit(
        expected_users=len(users),
        model=ModelRef(name=model.spec.model, weight_hash=weight_hash(model.spec.model)),
        adapter_config={"spec": model.spec.to_json(), "labels": labels.to_json(), "max_length": 16},
    )


@pytest.fixture(scope="session")
def world(build_world: Callable[[str], World]) -> World:
    """Classification: cohort a is in the generation, cohort b isn't."""
    return build_world("classification")


@pytest.fixture(scope="session")
def regression_world(build_world: Callable[[str], World]) -> World:
    return build_world("regression")
