"""What a training job publishes about itself: report.json for programs, report.html for people. No user ids, no texts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass
from functools import cached_property
from html import escape
from typing import Any

from plora_ray.adapters.calibration import Calibration
from plora_ray.adapters.fit import UserPrior
from plora_ray.data.stats import PartitionStats
from plora_ray.data.synthetic import Ceilings, SyntheticParams, ceilings
from plora_ray.errors import StoreError
from plora_ray.evaluation.comparison import Comparison
from plora_ray.evaluation.page import INTERVALS, comparison_table, page, picture, table
from plora_ray.evaluation.plots import gain_histograms
from plora_ray.evaluation.verdict import verdict
from plora_ray.store.manifest import SegmentRef
from plora_ray.training import plots
from plora_ray.training.plan import Plan
from plora_ray.training.rank import Assignment
from plora_ray.training.run_state import RunState
from plora_ray.training.scores import REMAINING_EDGES, WaveTotals
from plora_ray.training.telemetry.history import History

REPORT_JSON, REPORT_HTML = "report.json", "report.html"


def add_up(
    assignment: Assignment, run: RunState, stats: PartitionStats, segments: Mapping[int, SegmentRef], erased: Set[bytes]
) -> WaveTotals:
    """The outcomes of all waves, whose `segments` stand in the store; read a few at a time.

    Raises StoreError if a wave is missing or holds other users than were planned: only the `erased` may be missing.
    """
    totals, missing = WaveTotals(assignment.labels, stats), {wave.index: wave for wave in assignment.waves}
    for index, outcome in run.load_waves({wave: segments[wave].sha256 if wave in segments else None for wave in missing}):
        run.plan.check_users(missing.pop(index), outcome.users, erased)
        totals.add(outcome)
    if missing:
        raise StoreError(
            f"{len(missing)} of {len(assignment.waves)} waves are not trained (the first is {min(missing)}): run the job again"
        )
    return totals


@dataclass(frozen=True)
class TrainingReport:
    """What was trained and, if there are test rows, how well it predicts them with and without the user. seconds: of the last start.

    calibration: of the run's logits; None where they stand as trained. prior: that users were fitted under; None where their own
        Adam fitted them.
    """

    assignment: Assignment
    plan: Plan
    stats: PartitionStats
    totals: WaveTotals
    history: History
    seconds: float
    calibration: Calibration | None = None
    prior: UserPrior | None = None

    @cached_property
    def files(self) -> dict[str, bytes]:
        """By name, what lies beside the generation's manifest."""
        return {REPORT_JSON: json.dumps(self.values, indent=1).encode(), REPORT_HTML: self.render_html().encode()}

    @cached_property
    def comparison(self) -> Comparison | None:
        """With the user, without, and by the user's own labels; None without test rows."""
        return self.totals.comparison()

    @cached_property
    def ceilings(self) -> Ceilings | None:
        """The best any predictor could do, known for made-up users."""
        source = self.assignment.settings.data.source
        return ceilings(SyntheticParams.from_url(source)) if source.startswith("synthetic:") else None

    @property
    def _forgetting(self) -> dict[str, float] | None:
        """The half-life of dated rows in days, to three digits, and what is kept of fits whose rows count so."""
        found = None if self.prior is None else self.prior.forgetting
        return None if found is None else {"half_life_days": float(f"{found.half_life:.3g}"), "lasting": round(found.lasting, 4)}

    @property
    def verdict(self) -> str:
        if self.comparison is None:
            return f"{self.totals.users:,} users were trained. There are no test rows, so nothing says whether their adapters help."
        return verdict(self.comparison, (), None)

    @cached_property
    def values(self) -> dict[str, Any]:
        """What report.json holds."""
        report: dict[str, Any] = {
            "generation": self.assignment.generation,
            "verdict": self.verdict,
            "seconds": round(self.seconds, 1),
            "users": self.totals.users + self.totals.copied,
            "users_guarded": self.totals.guarded,
            "plan": self.plan.to_json(),
            "rows": {split: self.stats.rows(split) for split in ("train", "validation", "test")},
            "split_column": self.stats.split_column,
            "bad_rows_skipped": self.stats.skipped,
            "labels": self.assignment.labels.to_json(),
            "settings": self.assignment.settings.published(),
            "calibration": None if self.calibration is None else {"logit_scale": self.calibration.scale},
            "lasting": None if self.prior is None else round(self.prior.lasting, 4),
            "forgetting": self._forgetting,
            "training": {"seconds": self.history.seconds, "restarts": self.history.restarts, **self.history.to_json()},
        }
        if self.comparison is not None:
            report["test"] = self.totals.to_json(self.comparison)
        if self.totals.remaining is not None:
            users = self.totals.remaining_users.tolist()
            report["remaining"] = {"mean": round(self.totals.remaining, 5), "edges": REMAINING_EDGES.round(2).tolist(), "users": users}
        if self.ceilings is not None:
            report["ceilings"] = asdict(self.ceilings)
        return report

    def render_html(self) -> str:
        """The page: verdict first, then gains, then how training went, then what was trained."""
        title = f"Training of generation {self.assignment.generation}"
        sections = [*self._gains(), *self._uncertainty(), *self._course(), *self._facts()]
        return page(title, self.verdict, self._lead(), sections, INTERVALS)

    def _lead(self) -> str:
        settings = self.assignment.settings
        held = {held for start in self.history.starts[-1:] for held in start.parameter_bytes_held}
        told = [
            f"{self.totals.users:,} users",
            f"{self.stats.rows('train'):,} training rows",
            f"{self.history.seconds:,.0f} s of training",
            *(f"{len(start.parameter_bytes_held)} ranks, {start.sharding}" for start in self.history.starts[-1:]),
            *([f"{max(held) / 2**20:,.1f} MiB of parameters a rank"] if held else []),
        ]
        return (
            f"<p>Model {escape(settings.model.name)}, {escape(settings.task)}, data {escape(settings.data.shown)}.<br>"
            f"<strong>{escape(' · '.join(told))}</strong></p>"
        )

    def _gains(self) -> list[str]:
        if self.comparison is None:
            return []
        parts = ["<h2>Held-out rows</h2>", comparison_table(self.comparison)]
        if self.ceilings is not None:
            known, unknown = 100 * self.ceilings.with_user, 100 * self.ceilings.without_user
            parts.append(f"<p>Made-up users: no predictor can expect more than {known:.1f} % with the user, {unknown:.1f} % without.</p>")
        gains = {metric: found.means for metric, found in self.totals.user_gains().items()}
        parts += ["<h2>Who gains</h2>", picture("gain per user", gain_histograms(gains))]
        parts.append("<h2>Gain by the user's number of training rows</h2>")
        return [*parts, picture("gain by training rows", plots.gain_by_training_rows(self.totals.gain_by_training_rows()))]

    def _uncertainty(self) -> list[str]:
        if self.totals.remaining is None:
            return []
        text = f"<p>On average {100 * self.totals.remaining:.0f} % of what was unknown of a user before training is unknown after it.</p>"
        return ["<h2>What is still unknown of users</h2>", text, picture("remaining", plots.remaining(self.totals.remaining_users))]

    def _course(self) -> list[str]:
        if not self.history.samples:
            return []
        parts = ["<h2>Course of the training</h2>", picture("progress", plots.progress(self.history))]
        if self.history.restarts:
            parts.append(f"<p>The workers were started {self.history.restarts + 1} times; dotted lines are later starts.</p>")
        return parts

    def _facts(self) -> list[str]:
        rows = {split: self.stats.rows(split) for split in ("train", "validation", "test")}
        named = [
            ("users trained", f"{self.totals.users:,}"),
            ("users whom the guard leaves to the population", f"{self.totals.guarded:,}"),
            ("users carried over", f"{self.totals.copied:,}"),
            ("rows", ", ".join(f"{count:,} {split}" for split, count in rows.items())),
            ("bad rows skipped", ", ".join(f"{count:,} {why}" for why, count in self.stats.skipped.items()) or "none"),
            *([("scale of the logits", f"{self.calibration.scale:.2f}")] if self.calibration is not None else []),
            *self._kept(),
            ("waves", f"{len(self.assignment.waves):,}"),
            ("seconds of training, all starts", f"{self.history.seconds:,.1f}"),
            ("restarts of the workers", f"{self.history.restarts}"),
        ]
        facts = ["<h2>What was trained</h2>", table([], [list(pair) for pair in named])]
        if self.history.starts:
            facts.append(self._ranks())
        return facts

    def _kept(self) -> list[tuple[str, str]]:
        """What is kept of fits, and of those whose rows count by their age."""
        kept = [] if self.prior is None else [("kept of what is found of a user", f"{100 * self.prior.lasting:.0f} %")]
        if self._forgetting is not None:
            kept.append(("kept where rows count by their age", f"{100 * self._forgetting['lasting']:.0f} %"))
            kept.append(("days after which a row counts half", f"{self._forgetting['half_life_days']:,g}"))
        return kept

    def _ranks(self) -> str:
        head = ["start, s", "", "ranks", "sharding", "parameters, MiB", "held by each rank, MiB"]
        lines: list[list[str]] = []
        for start in self.history.starts:
            held = [f"{size / 2**20:,.1f}" for size in start.parameter_bytes_held]
            shown = held[0] if len(set(held)) == 1 else ", ".join(held)
            how = "job started again" if start.resumed else "workers restarted" if lines else "first start"
            whole = f"{start.parameter_bytes / 2**20:,.1f}"
            lines.append([f"{start.seconds:,.0f}", how, str(len(held)), start.sharding, whole, shown])
        return table(head, lines)
