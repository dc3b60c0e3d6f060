"""The questions an evaluation asks of the current generation, each answered beside baselines on the same rows.

    full    users the generation has trained: how much better are the answers with the user than without?
    time    the same, trained on the past and tested on the future: what becomes of the gain as time goes on?
    zero    users it has never met: how good is the population's answer, which is what they get?
    few     the same users after 1, 2, 4, ... of their own examples: how fast does an adapter pay?

Measures the generation itself: adapters fitted online since it was published are not looked at. Writes nothing to the store.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from plora_ray.config import Settings
from plora_ray.errors import ConfigError, DataError
from plora_ray.evaluation.comparison import LABEL_PRIOR, MAJORITY, POPULATION, WITH_USER, Comparison, compare, examples_told
from plora_ray.evaluation.cost_page import CostPage
from plora_ray.evaluation.costs import Costs
from plora_ray.evaluation.generation_cost import generation_costs, label_costs
from plora_ray.evaluation.metrics import Floats, Ints
from plora_ray.evaluation.parts import held_together
from plora_ray.evaluation.periods import drift, in_parts
from plora_ray.evaluation.predictor_cost import PredictorCost
from plora_ray.evaluation.progress import Stages
from plora_ray.evaluation.report import Evaluation, ProtocolResult, write_report
from plora_ray.evaluation.rivals.panel import RivalPanel
from plora_ray.evaluation.rivals.registry import RIVALS, check_installed
from plora_ray.evaluation.rows import EvaluationRows, encode_labels, read_rows
from plora_ray.evaluation.scoring import TextScorer, predictions
from plora_ray.evaluation.trained_split import check_split
from plora_ray.inference import Examples, FewShotFitter, InferenceEngine, LoadedGeneration, load_generation
from plora_ray.opening import open_store
from plora_ray.sizing import load_prices

PROTOCOLS = ("full", "few", "zero", "time")
BASELINES = (MAJORITY, LABEL_PRIOR, POPULATION)
SHOTS = (1, 2, 4, 8, 16)
_SEEN: dict[str, tuple[str, int | None]] = {"full": (WITH_USER, None), "zero": (POPULATION, 0)}  # subject; examples of each user seen
OnRows = Callable[[str, int | None, Mapping[str, Floats], NDArray[np.number], Ints], None]
USERS_PER_FIT = 64  # fitted together: 64 x 16 Jacobians of a few kilobytes each


def evaluate_store(
    settings: Settings, protocol: str, baselines: list[str], out: Path, on_rows: OnRows | None = None, shots: Sequence[int] = SHOTS
) -> dict[str, Any]:
    """Evaluate the store's current generation on `settings.data`; write report.json, report.html and plots into `out`.

    Returns what report.json holds. protocol: one of PROTOCOLS, or all (time among them with data.split_times). baselines: any of
    BASELINES and of RIVALS, which are trained first; the population is always reported, since gains are measured against it. A protocol
    without test rows is reported as skipped.
    on_rows: told of every comparison: its protocol, examples, predictions (see `compare`), labels [rows] and users' numbers [rows].
    shots: numbers of examples that `few` asks about.
    Raises ConfigError for unknown names and for rows divided otherwise than in training, DataError if nothing could be evaluated,
    StoreError and ModelError on loading.
    """
    protocols = _chosen_protocols(protocol, dated=settings.data.split_times is not None)
    _check_baselines(baselines)
    _check_folder(out)
    rivals = [name for name in RIVALS if name in baselines]
    store = open_store(settings.store)
    loaded = load_generation(store)
    if settings.task != loaded.labels.task:
        raise ConfigError(f"task is {settings.task}, but generation {loaded.name} was trained for {loaded.labels.task}: set task to that")
    if settings.evaluation.prices is not None:
        load_prices(settings.evaluation.prices)  # wrong ones are told of now, not after the work
    given = settings.evaluation.cost_matrix
    error_costs = Costs.of(given, loaded.labels) if given is not None else None
    if settings.training.use_gpu is not False and torch.cuda.is_available():
        loaded.model.to("cuda")
    with Stages() as stages:
        stages.begin("reading units of data", 0)
        rows = read_rows(
            settings.data, store, loaded.reader, loaded.labels,
            examples_kept=max(shots), on_unit=stages.at, keep_training=bool(rivals),
            leave_out_learnt=settings.evaluation.leave_out_learnt_texts,
        )  # fmt: skip
        if rows.divided:
            check_split(store, loaded.name, settings.data)
        engine = InferenceEngine(loaded, batch_tokens=_batch_tokens(settings, loaded), batch_rows=settings.serving.batch_rows)
        try:
            panel = RivalPanel(rivals, settings, loaded, rows, stages)
            scorer = TextScorer(engine, rows.texts, stages)
            run = _Run(settings, loaded, rows, scorer, stages, baselines, error_costs, panel, shots, on_rows)
            results = [run.protocol(name) for name in protocols]
            stages.begin("one text at a time", 0)
            predictor_costs = (
                {**generation_costs(engine, rows), **label_costs(rows, baselines), **panel.costs()} if len(rows.labels) else {}
            )
        finally:
            engine.close()
        if all(result.skipped for result in results):
            raise DataError("nothing to evaluate: " + "; ".join(f"{result.name}: {result.skipped}" for result in results))
        report = write_report(run.evaluation(results, predictor_costs), out)
        stages.say(report["verdict"])
        stages.say(f"report: {out / 'report.html'}")
    return report


def _chosen_protocols(protocol: str, *, dated: bool) -> Sequence[str]:
    if protocol == "all":
        return [name for name in PROTOCOLS if dated or name != "time"]
    if protocol == "time" and not dated:
        raise ConfigError("protocol time needs data.split_times, which trains on the past and tests on the future: set it")
    if protocol not in PROTOCOLS:
        raise ConfigError(f"unknown protocol {protocol!r}: use one of {', '.join((*PROTOCOLS, 'all'))}")
    return (protocol,)


def _check_baselines(baselines: Sequence[str]) -> None:
    for name in baselines:
        if name not in (*BASELINES, *RIVALS):
            raise ConfigError(f"unknown baseline {name!r}: use any of {', '.join((*BASELINES, *RIVALS))}")
    check_installed(baselines)


def _check_folder(out: Path) -> None:
    """Before hours of work rather than after."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out} can't be made a directory: {error.strerror or error}") from error


def _batch_tokens(settings: Settings, loaded: LoadedGeneration) -> int:
    return max(settings.serving.batch_tokens, loaded.max_length)


@dataclass
class _Run:
    """One evaluation: the generation, the rows and what scores them."""

    settings: Settings
    loaded: LoadedGeneration
    rows: EvaluationRows
    scorer: TextScorer
    stages: Stages
    baselines: Sequence[str]
    costs: Costs | None
    panel: RivalPanel
    shots: Sequence[int]
    on_rows: OnRows | None = None

    def protocol(self, name: str) -> ProtocolResult:
        """Run one protocol on the test rows it is about."""
        known = self.rows.known[self.rows.row_users] if len(self.rows.keys) else np.zeros(0, bool)
        chosen = np.flatnonzero(known if name in ("full", "time") else ~known)
        if not len(chosen):
            whose = "in the generation" if name in ("full", "time") else f"outside generation {self.loaded.name}"
            reason = f"the data has no test rows of users {whose} (check data.source, data.filter and the splits)"
            return ProtocolResult(name, skipped=reason)
        if name == "time":
            periods = self._periods(chosen)
            return ProtocolResult(name, (self._compare(self._with_user, chosen, WITH_USER, None),), note=drift(periods), periods=periods)
        if name in ("full", "zero"):
            predicted, seen = self._with_user if name == "full" else self._zero(chosen), _SEEN[name]
            self._tell(name, seen[1], predicted, chosen)
            return ProtocolResult(name, (self._compare(predicted, chosen, *seen),), groups=self._groups(predicted, chosen, *seen))
        points = {shots: point for shots in self.shots if (point := self._few(chosen, shots))}
        if not points:
            return ProtocolResult(name, skipped="the users outside the generation who have test rows have no training rows")
        most = max(points)
        missing = ", ".join(str(shots) for shots in self.shots if shots > most)
        note = f"No user outside the generation has training rows for {missing} examples"
        compared = tuple(self._compare(*point, WITH_USER, shots) for shots, point in points.items())
        return ProtocolResult(name, compared, note=note if missing else None, groups=self._groups(*points[most], WITH_USER, most))

    def evaluation(self, results: Sequence[ProtocolResult], predictor_costs: Mapping[str, PredictorCost]) -> Evaluation:
        """The results with what they were measured on."""
        rows, data = self.rows, self.settings.data
        return Evaluation(
            generation=self.loaded.name,
            model=self.loaded.model.spec.model,
            labels=self.loaded.labels,
            data={
                "source": data.shown,
                "filter": dict(data.filter),
                "test_rows": len(rows.labels),
                "different_test_texts": len(rows.texts),
                "test_rows_with_a_training_text": rows.learnt_texts,
                "rows_with_a_training_text_left_out": self.settings.evaluation.leave_out_learnt_texts,
                "test_rows_digest": rows.digest,
                "train_rows": rows.train_rows,
                "users_in_generation": int(rows.known.sum()),
                "users_unknown": int((~rows.known).sum()),
                "users_erased_and_left_out": rows.erased_users,
                "bad_rows_skipped": rows.bad_rows,
                "split_seed": data.split_seed,
                "learning_rates_of_trained_baselines": [f"{factor:g}x" for factor in self.settings.evaluation.baseline_rates],
                "seed": self.settings.training.seed,
            },
            results=tuple(results),
            costs=CostPage.of(
                self.loaded.model, self.settings.evaluation, tokens=self.scorer.mean_tokens,
                rows_per_user=rows.train_rows / max(len(rows.keys), 1),
            ),
            predictor_costs=predictor_costs,
            calibrations=self.panel.calibrations, rates=self.panel.rates,
        )  # fmt: skip

    @cached_property
    def _with_user(self) -> dict[str, Floats]:
        """What every predictor says of all rows of users in the generation."""
        chosen = np.flatnonzero(self.rows.known[self.rows.row_users])
        users, places = np.unique(self.rows.row_users[chosen], return_inverse=True)
        keys = [self.rows.keys[user] for user in users]
        adapters = self.loaded.reader.get_many(keys)
        vectors = np.stack([adapters[key].record for key in keys])
        return self._predicted(self.scorer.personal("rows with user", self.rows.row_texts[chosen], vectors[places]), chosen, None)

    def _zero(self, chosen: Ints) -> dict[str, Floats]:
        return self._predicted(None, chosen, 0)

    def _periods(self, chosen: Ints) -> dict[str, Comparison]:
        """The comparison on the rows of each part of the test's time that has any."""
        return self._divided(self._with_user, chosen, *in_parts(self.rows.row_times[chosen]), WITH_USER, None)

    def _groups(self, predicted: Mapping[str, Floats], chosen: Ints, subject: str, examples: int | None) -> dict[str, Comparison]:
        """The same comparison on the rows of each group that has any."""
        return self._divided(predicted, chosen, self.rows.groups, self.rows.row_groups[chosen], subject, examples)

    def _divided(
        self, predicted: Mapping[str, Floats], chosen: Ints, names: Sequence[str], parts: Ints, subject: str, examples: int | None
    ) -> dict[str, Comparison]:
        """Row i of `chosen` is in part `names[parts[i]]`, or in none below zero."""
        found = {}
        for part, name in enumerate(names):
            mine = parts == part
            if mine.any():
                found[name] = self._compare({who: values[mine] for who, values in predicted.items()}, chosen[mine], subject, examples)
        return held_together(found)

    def _few(self, chosen: Ints, shots: int) -> tuple[dict[str, Floats], Ints] | None:
        """What every predictor says of the rows of users who have at least `shots` examples, and which these are; None if nobody has."""
        examples = self.rows.examples
        ready = [int(user) for user in np.unique(self.rows.row_users[chosen]) if len(examples.get(int(user), ())) >= shots]
        if not ready:
            return None
        vectors = self._fit(ready, shots)
        chosen = chosen[np.isin(self.rows.row_users[chosen], ready)]
        places = np.searchsorted(ready, self.rows.row_users[chosen])
        personal = self.scorer.personal(f"rows after {examples_told(shots)}", self.rows.row_texts[chosen], vectors[places])
        predicted = self._predicted(personal, chosen, shots)
        self._tell("few", shots, predicted, chosen)
        return predicted, chosen

    def _fit(self, users: Sequence[int], shots: int) -> NDArray[np.float32]:
        """Vectors [users, d] fitted on the first `shots` examples of each."""
        fitter = FewShotFitter(self.loaded, batch_tokens=_batch_tokens(self.settings, self.loaded))
        self.stages.begin(f"fitting users on {examples_told(shots)}", len(users))
        vectors = []
        for start in range(0, len(users), USERS_PER_FIT):
            group = [self.rows.examples[user][:shots] for user in users[start : start + USERS_PER_FIT]]
            fits = fitter.fit_many([Examples([text for text, _ in seen], [label for _, label in seen]) for seen in group])
            vectors += [fit.vector for fit in fits]
            self.stages.advance(len(group))
        return np.stack(vectors)

    def _predicted(self, personal: NDArray[np.float32] | None, chosen: Ints, examples: int | None) -> dict[str, Floats]:
        """What every predictor says of the rows. personal: logits [rows, outputs] with the user, if there are any."""
        labels = self.loaded.labels
        predicted = {} if personal is None else {WITH_USER: predictions(personal, labels)}
        predicted[POPULATION] = predictions(self.scorer.population(self.rows.row_texts[chosen]), labels)
        return predicted | self.panel.predict(chosen, examples) | self._baselines(self.rows.row_users[chosen], examples)

    def _tell(self, protocol: str, examples: int | None, predicted: Mapping[str, Floats], chosen: Ints) -> None:
        if self.on_rows is not None:
            self.on_rows(protocol, examples, predicted, self.rows.labels[chosen], self.rows.row_users[chosen])

    def _compare(self, predicted: Mapping[str, Floats], chosen: Ints, subject: str, examples: int | None) -> Comparison:
        labels = self.loaded.labels
        truth, owners = self.rows.labels[chosen], self.rows.row_users[chosen]
        return compare(subject, predicted, truth, owners, labels.task, values=labels.values, costs=self.costs, examples=examples)

    def _baselines(self, row_users: Ints, examples: int | None) -> dict[str, Floats]:
        """The baselines that read no text; without any training row in the data there is nothing to make them of."""
        history = self.rows.history
        if history.rows == 0:
            return {}
        if examples is not None:  # a new user's label prior knows exactly the examples that the fit has seen
            seen = [(user, label) for user in np.unique(row_users) for _, label in self.rows.examples.get(int(user), [])[:examples]]
            given = encode_labels([label for _, label in seen], self.loaded.labels)
            history = history.restricted_to(np.array([user for user, _ in seen], np.int64), given)
        found = {MAJORITY: history.majority, LABEL_PRIOR: history.label_prior}
        return {name: predict(row_users) for name, predict in found.items() if name in self.baselines}
