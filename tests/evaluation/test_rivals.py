"""The trained baselines: each one learns what it says it learns, and the report says what it costs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.special import softmax
from torch import nn
from torch.nn import functional as F

from plora_ray.adapters.calibration import best_scale, scale_losses
from plora_ray.adapters.labels import LabelSpace
from plora_ray.adapters.objective import MutualInformation
from plora_ray.adapters.pretrained import load_plm, load_tokenizer
from plora_ray.config import Settings, parse_settings
from plora_ray.errors import ConfigError
from plora_ray.evaluation.metrics import log_softmax, row_nll
from plora_ray.evaluation.progress import Stages
from plora_ray.evaluation.protocols import evaluate_store
from plora_ray.evaluation.rivals import released, shuffled
from plora_ray.evaluation.rivals.calibrations import RivalCalibration
from plora_ray.evaluation.rivals.identifiers import IDENTIFIER_TOKENS, UserIdentifier, identifier
from plora_ray.evaluation.rivals.panel import RivalPanel, setup_of
from plora_ray.evaluation.rivals.registry import RIVALS, build_rivals
from plora_ray.evaluation.rivals.released import Recipe, ReleasedPlora
from plora_ray.evaluation.rivals.rival import RivalSetup, strangers
from plora_ray.evaluation.rivals.shuffled import in_terms_of
from plora_ray.evaluation.rows import EvaluationRows, read_rows
from plora_ray.evaluation.scoring import predictions
from plora_ray.inference import load_generation

if TYPE_CHECKING:
    from tests.evaluation.conftest import World

RATE = 0.02


def ignore(rows: int) -> None:
    """Nobody watches."""


def settings_of(world: World) -> Settings:
    """One batch holds all rows, so that a pass is a step and no order matters."""
    training = {"epochs": 2, "batch_rows": 1000, "batch_tokens": 100_000, "learning_rate": RATE, "num_workers": 1, "partitions": 1}
    return parse_settings({**world.settings.model_dump(mode="json", exclude_unset=True), "training": training})


@pytest.fixture(scope="module")
def parts(world: World) -> tuple[RivalSetup, EvaluationRows]:
    loaded, settings = load_generation(world.store), settings_of(world)
    with Stages() as stages:
        stages.begin("reading", 0)
        rows = read_rows(settings.data, world.store, loaded.reader, loaded.labels, examples_kept=4, on_unit=stages.at, keep_training=True)
    return setup_of(settings, loaded, rows), rows


class PlainClassifier(nn.Module):
    """Mean-pooled BERT with PEFT's LoRA and a head, as anybody would write it."""

    def __init__(self, model: str, classes: int) -> None:
        super().__init__()
        self.tokenizer = load_tokenizer(model)
        torch.manual_seed(0)
        config = LoraConfig(r=4, lora_alpha=8.0, target_modules=["query", "value"])
        self.plm = get_peft_model(load_plm(model), config).eval()
        torch.manual_seed(0)
        self.head = nn.Linear(32, classes)

    def forward(self, texts: list[str]) -> torch.Tensor:
        tokens = self.tokenizer(texts, return_tensors="pt", padding=True)
        hidden = self.plm(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1)
        return self.head((hidden * mask).sum(1) / mask.sum(1))

    def learn(self, texts: list[str], labels: torch.Tensor) -> None:
        """Two steps; so few that the rate neither warms up nor decays."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            F.cross_entropy(self(texts), labels).backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()


def test_a_lora_of_each_users_own_is_what_pefts_plain_loop_makes_of_everybodys_and_then_of_the_users_rows(
    parts: tuple[RivalSetup, EvaluationRows],
) -> None:
    setup, rows = parts
    assert rows.training is not None
    rivals = build_rivals(["population-lora", "lora-per-user"], setup)
    for rival in rivals.values():
        rival.fit(rows.training, ignore)
    user, texts = int(rows.training.users[-1]), rows.texts[:8]
    plain = PlainClassifier(setup.spec.model, 2)
    plain.learn(list(rows.training.texts), setup.targets(rows.training))
    with torch.no_grad():
        population = plain(texts).numpy()
    own = rows.training.of(user)
    plain.learn(list(own.texts), setup.targets(own))
    with torch.no_grad():
        personal = plain(texts).numpy()
    users = np.full(len(texts), user)
    np.testing.assert_allclose(rivals["lora-per-user"].logits(users, texts), personal, atol=2e-4)
    np.testing.assert_allclose(rivals["population-lora"].logits(users, texts), population, atol=2e-4)
    assert np.abs(personal - population).max() > 0.05
    stranger = np.full(len(texts), 10_000)
    np.testing.assert_array_equal(rivals["lora-per-user"].logits(stranger, texts), rivals["population-lora"].logits(stranger, texts))


def test_bitfit_changes_biases_and_the_head_and_nothing_else(parts: tuple[RivalSetup, EvaluationRows]) -> None:
    setup, rows = parts
    assert rows.training is not None
    rival: Any = build_rivals(["user-identifier-bitfit"], setup)["user-identifier-bitfit"]
    before = {name: value.clone() for name, value in rival._model.state_dict().items()}
    rival.fit(rows.training, ignore)
    changed = {name for name, value in rival._model.state_dict().items() if not torch.equal(value, before[name])}
    biases = {name for name in before if name.endswith("bias")}
    keys = {name for name in biases if name.endswith("key.bias")}  # a constant in every score of a softmax: no gradient
    assert biases - keys <= changed <= biases | {"head.weight"}
    assert set(rival.trained()) == biases | {"head.weight"}
    assert rival.size().in_all == sum(value.numel() for value in rival.trained().values())


def test_a_users_string_is_his_own_the_same_every_time_and_stands_right_before_the_text(parts: tuple[RivalSetup, EvaluationRows]) -> None:
    setup, rows = parts
    strings = [identifier(key, 0, setup.ordinary_tokens) for key in setup.keys]
    assert strings == [identifier(key, 0, setup.ordinary_tokens) for key in setup.keys]
    assert len({tuple(string) for string in strings}) == len(strings)
    assert strings[0] != identifier(setup.keys[0], 1, setup.ordinary_tokens)
    tokenizer = load_tokenizer(setup.spec.model)
    assert not {token for string in strings for token in string} & set(tokenizer.all_special_ids)
    rival: Any = build_rivals(["user-identifier-bitfit"], setup)["user-identifier-bitfit"]
    plain = tokenizer(rows.texts[0])["input_ids"]
    assert rival.read_by(np.array([3]), rows.texts[:1]) == [[plain[0], *strings[3], *plain[1:]]]
    longest = rival.read_by(np.array([3]), [" ".join(["word1"] * 16)])[0]
    assert len(longest) <= 32 - IDENTIFIER_TOKENS and longest[-1] == plain[-1]  # the model has 32 positions, of which a prefix takes ten


def plain_released_loss(objective: Any, ids: torch.Tensor, vectors: torch.Tensor, labels: torch.Tensor, weight: float) -> torch.Tensor:
    """Cross-entropy, the mean square of each layer's s B P p, and the divergence at temperature 4, on a BERT with hooks."""
    shared = {name: value.detach() for name, value in objective.model.shared_parameters().items()}
    plm, scale = load_plm(objective.model.spec.model), released.ALPHA / released.RANK
    layers = [name[7:-2] for name in shared if name.endswith(".A")]
    effects: list[torch.Tensor] = []

    def represent(users: torch.Tensor | None) -> torch.Tensor:
        def hook_of(name: str) -> Any:
            def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
                a, b, p = (shared[f"layers.{name}.{part}"] for part in "ABP")
                added = scale * inputs[0] @ a.T @ b.T
                if users is None:
                    return output + added
                effects.append(scale * users @ p.T @ b.T)
                return output + added + effects[-1].unsqueeze(1)

            return hook

        hooks = [plm.get_submodule(name).register_forward_hook(hook_of(name)) for name in layers]
        hidden = plm(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.mean(1)
        for hook in hooks:
            hook.remove()
        return hidden

    user, nobody = (F.linear(represent(who), shared["head.weight"], shared["head.bias"]) for who in (vectors, None))
    probabilities = torch.softmax(user / 4, -1)
    divergence = (probabilities * (torch.log_softmax(user / 4, -1) - torch.log_softmax(nobody / 4, -1))).sum(-1).mean()
    squares = torch.stack([effect.square().mean() for effect in effects]).mean()
    return F.cross_entropy(user, labels) + weight * (squares + divergence)


def test_the_released_method_minimises_its_formula_and_new_users_move_their_vectors_alone(
    parts: tuple[RivalSetup, EvaluationRows], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup, rows = parts
    assert rows.training is not None
    monkeypatch.setattr(released, "DROPOUT", 0.0)
    rival: Any = ReleasedPlora(setup, Recipe(RATE, 0.0, MutualInformation(0.3), 64))
    rival.fit(rows.training, ignore)
    rival._objective.train()
    ids = setup.encode(rows.texts[:6])
    vectors, labels = torch.randn(6, released.USER_DIM), torch.tensor([0, 1, 1, 0, 1, 0])
    with torch.no_grad():
        loss = rival.loss(ids, vectors, labels)
        expected = plain_released_loss(rival._objective, torch.tensor(ids), vectors, labels, 0.3)
        assert F.cross_entropy(rival._forward(torch.tensor(ids), torch.ones(6, len(ids[0]), dtype=torch.int64), vectors), labels) < expected
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)
    rival._objective.eval()
    known, newcomer = rows.training.users[:4], 10_000
    before = rival.logits(known, rows.texts[:4])
    stranger = rival.logits(np.array([newcomer]), rows.texts[:1])
    own = rows.training.of(int(known[0]))
    rival.meet(type(own)(np.full(len(own.texts), newcomer), own.texts, own.labels), ignore)
    np.testing.assert_array_equal(rival.logits(known, rows.texts[:4]), before)
    assert np.abs(rival.logits(np.array([newcomer]), rows.texts[:1]) - stranger).max() > 1e-4
    rival.meet(type(own)(np.array([], np.int64), [], []), ignore)
    np.testing.assert_array_equal(rival.logits(np.array([newcomer]), rows.texts[:1]), stranger)


def test_a_report_has_each_trained_baseline_with_its_parameters_and_latency_and_names_nobody(world: World, tmp_path: Path) -> None:
    names = [name for name in RIVALS if name != "shuffled-users"]
    report = evaluate_store(settings_of(world), "all", names, tmp_path, shots=(2,))
    for protocol in ("full", "zero"):
        assert set(names) < set(report["protocols"][protocol]["predictors"])
        assert all(0 <= report["protocols"][protocol]["gain_over"][name]["nll"]["p"] <= 1 for name in names)
    zero = report["protocols"]["zero"]["predictors"]
    assert zero["lora-per-user"]["accuracy"] == zero["population-lora"]["accuracy"]  # what was learnt of new users in few-shot is forgotten
    costs, lora = report["predictor_costs"], 2 * 2 * (4 * 32 + 4 * 32) + 2 * 32 + 2
    assert set(costs) == {"with_user", "population", *names}, "majority and label-prior weren't asked for"
    assert all(cost["seconds_per_request"] > 0 for cost in costs.values())
    assert (costs["population-lora"]["parameters_per_user"], costs["population-lora"]["parameters_in_all"]) == (0, lora)
    assert (costs["lora-per-user"]["parameters_per_user"], costs["lora-per-user"]["parameters_in_all"]) == (lora, 25 * lora)
    assert costs["with_user"]["parameters_in_all"] - costs["population"]["parameters_in_all"] == 4 * 24
    page, plain = (tmp_path / "report.html").read_text(), json.dumps(report)
    assert "PEFT LoRA for each user" in page and "parameters a user" in page
    assert report["calibrations"] == {}, "this data has no validation rows"
    assert not [secret for secret in world.secrets if secret in page or secret in plain]


def test_every_trained_baseline_is_calibrated_on_validation_rows_as_the_generation_is(world: World, tmp_path: Path) -> None:
    watched, held_out = world.with_validation_rows(tmp_path)
    loaded, settings = load_generation(world.store), settings_of(world)
    settings = settings.model_copy(update={"data": watched.data})
    found = {}
    with Stages() as stages:
        stages.begin("reading", 0)
        rows = read_rows(settings.data, world.store, loaded.reader, loaded.labels, examples_kept=4, on_unit=stages.at, keep_training=True)
        assert rows.validation is not None
        assert len(rows.validation.users) == sum(row["split"] == "validation" and row["cohort"] == "a" for row in held_out) > 100
        for calibrate in (True, False):
            with_it = settings.model_copy(update={"training": settings.training.model_copy(update={"calibrate": calibrate})})
            panel = RivalPanel(["population-lora"], with_it, loaded, rows, stages)
            found[calibrate] = panel.calibrations, panel.predict(np.arange(len(rows.labels)), None)["population-lora"]
            logits = torch.from_numpy(panel._rivals["population-lora"].logits(rows.validation.users, rows.validation.texts))
    labels = loaded.labels.encode(list(rows.validation.labels))
    (calibrations, calibrated), (none, as_trained) = found[True], found[False]
    learnt = [row["label"] for row in held_out if row["split"] == "train" and row["cohort"] == "a"]
    base = [np.log((learnt.count(name) + 1) / (len(learnt) + 2)) for name in ("no", "yes")]
    used = calibrations["population-lora"].known
    assert none == {} and used.base == pytest.approx(base)
    assert used.scale == best_scale(scale_losses(logits, labels, base))
    np.testing.assert_allclose(calibrated, log_softmax(base + used.scale * (as_trained - base)), atol=1e-5)


def test_a_baseline_is_as_sure_of_strangers_as_it_may_be_of_strangers(parts: tuple[RivalSetup, EvaluationRows]) -> None:
    setup, rows = parts
    assert rows.training is not None
    rival = build_rivals(["lora-per-user"], setup)["lora-per-user"]
    rival.fit(rows.training, lambda _: None)
    found = RivalCalibration.of(rival, setup.labels, rows.training, rows.training)
    unmet = np.full(len(rows.training.users), -1)
    base, labels = list(found.new.base), setup.labels.encode(list(rows.training.labels))
    answers = {"known": rival.logits(rows.training.users, rows.training.texts), "new": rival.logits(unmet, rows.training.texts)}
    for who, logits in answers.items():
        assert getattr(found, who).scale == best_scale(scale_losses(torch.from_numpy(logits), labels, base))
    assert found.known.scale != found.new.scale and found.at(None) == found.known and found.at(0) == found.at(4) == found.new


def test_a_stranger_has_another_identifier_than_anybody_met(parts: tuple[RivalSetup, EvaluationRows]) -> None:
    setup, _ = parts
    rival = build_rivals(["user-identifier-ia3"], setup)["user-identifier-ia3"]
    assert isinstance(rival, UserIdentifier)
    users, texts = np.arange(len(setup.keys)), ["a text"] * len(setup.keys)
    read = [tuple(ids) for people in (users, strangers(users)) for ids in rival.read_by(people, texts)]
    assert len(set(read)) == 2 * len(users)


def test_users_shuffled_among_the_rows_gain_nothing(parts: tuple[RivalSetup, EvaluationRows]) -> None:
    setup, rows = parts
    assert rows.training is not None
    rival = build_rivals(["shuffled-users"], setup)["shuffled-users"]
    rival.fit(rows.training, ignore)
    tests = np.flatnonzero(rows.known[rows.row_users])
    texts, labels = [rows.texts[text] for text in rows.row_texts[tests]], rows.labels[tests].astype(np.int64)
    users, nobody = rows.row_users[tests], np.full(len(tests), 10_000)
    personal, population = (row_nll(predictions(rival.logits(who, texts), setup.labels), labels) for who in (users, nobody))
    assert (population - personal).mean() < 0.03  # the true adapters of these users gain ten times that
    rival.meet(rows.training, ignore)
    met = row_nll(predictions(rival.logits(users, texts), setup.labels), labels)
    assert not np.array_equal(met, personal) and (population - met).mean() < 0.03
    assert rival.size().in_all > rival.size().per_user * 24


def test_a_job_that_lacks_a_class_or_scales_otherwise_is_read_in_the_generations_terms() -> None:
    wanted, given = LabelSpace("classification", ("a", "b", "c")), LabelSpace("classification", ("a", "c"))
    found = in_terms_of(wanted, np.array([[1.0, 3.0], [2.0, -1.0]], np.float32), given)
    assert found.argmax(axis=1).tolist() == [2, 0]
    np.testing.assert_allclose(np.exp(log_softmax(found))[:, [0, 2]], softmax([[1.0, 3.0], [2.0, -1.0]], axis=1), atol=1e-6)
    wide, narrow = LabelSpace("regression", (), mean=500.0, std=20.0), LabelSpace("regression", (), mean=5.0, std=2.0)
    answers = in_terms_of(narrow, np.array([[0.5]], np.float32), wide)
    assert answers[0, 0] * narrow.std + narrow.mean == pytest.approx(0.5 * wide.std + wide.mean)


def test_a_job_that_trains_a_baseline_ends_with_the_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow.py").write_text("import pathlib, time\npathlib.Path('began').touch()\ntime.sleep(600)\n")
    monkeypatch.setattr(shuffled, "COMMAND", ["slow.py"])
    started: list[subprocess.Popen[str]] = []
    popen = subprocess.Popen

    class Watched(popen):  # type: ignore[misc, valid-type]
        def wait(self, timeout: float | None = None) -> int:
            if not started:
                started.append(self)
                raise KeyboardInterrupt
            return int(super().wait(timeout))

    monkeypatch.setattr(subprocess, "Popen", Watched)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        shuffled._train(tmp_path)
    assert started[0].returncode is not None and started[0].returncode != 0


def test_a_baseline_whose_package_is_missing_is_one_line(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"^baseline population-lora needs PEFT: pip install 'peft>=0\.17', or leave it out$"):
        evaluate_store(world.settings, "full", ["population-lora"], tmp_path)
    evaluate_store(settings_of(world), "full", ["user-identifier-bitfit"], tmp_path)
