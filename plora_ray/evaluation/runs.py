"""Several evaluations side by side: what each run answered with the user and without, protocol by protocol.

Reads report.json files; knows no model and no data. Runs are compared by their own figures: only within a run are rows paired.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from plora_ray.errors import ConfigError
from plora_ray.evaluation.comparison import POPULATION, WITH_USER, examples_told
from plora_ray.evaluation.page import METRICS, page

COLUMNS = ("run", "protocol", "examples", "users", "rows")


@dataclass(frozen=True)
class RunLine:
    """One protocol (few-shot: one number of examples) of one run. metrics: by name, (without user, with user, gain, its interval).

    answered: by metric, the interval of what the generation answers. digest: of what was asked (see EvaluationRows); None in older reports.
    """

    run: str
    protocol: str
    examples: int | None
    users: int
    rows: int
    harmed: float | None
    metrics: dict[str, tuple[float, float | None, float | None, tuple[float, float] | None]]
    answered: dict[str, tuple[float, float]]
    digest: str | None

    def to_json(self) -> dict[str, Any]:
        names = ("without_user", "with_user", "gain", "interval")
        return {**vars(self), "metrics": {metric: dict(zip(names, values, strict=True)) for metric, values in self.metrics.items()}}


def compare_runs(folders: Sequence[Path], out: Path) -> list[RunLine]:
    """Write comparison.json and comparison.html into `out`. folders: what `plora evaluate --out` wrote, two or more.

    Raises ConfigError for a folder without a readable report, for one name given twice, and if `out` can't be written.
    """
    if len(folders) < 2:
        raise ConfigError("name two folders or more, each with a report.json that `plora evaluate --out` wrote")
    names = _names(folders)
    lines = [line for name, folder in zip(names, folders, strict=True) for line in _lines(name, folder / "report.json")]
    lines.sort(key=lambda line: (line.protocol, line.examples or 0, names.index(line.run)))
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "comparison.json").write_text(json.dumps([line.to_json() for line in lines], indent=1) + "\n", encoding="utf-8")
        (out / "comparison.html").write_text(_page(names, lines), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out {out} can't be written: {error.strerror or error}") from error
    return lines


def _names(folders: Sequence[Path]) -> list[str]:
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    if len(set(names)) < len(names):
        raise ConfigError("a folder is named twice")
    return names


def _lines(run: str, path: Path) -> Iterator[RunLine]:
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        for protocol, found in report["protocols"].items():
            for point in found.get("points", [found]) if found["status"] == "evaluated" else ():
                yield _line(run, protocol, point, report["data"].get("test_rows_digest"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it isn't a report ({type(error).__name__})"
        raise ConfigError(f"{path} can't be read: {reason}; `plora evaluate --out` writes one") from error


def _line(run: str, protocol: str, point: dict[str, Any], digest: str | None) -> RunLine:
    population, personal = point["predictors"][POPULATION], point["predictors"].get(WITH_USER)
    metrics = {}
    for metric in population["intervals"]:
        gain = None if personal is None else point["gain_over"][POPULATION][metric]
        metrics[metric] = (
            population[metric], None if personal is None else personal[metric], None if gain is None else gain["mean"],
            None if gain is None else (gain["low"], gain["high"]),
        )  # fmt: skip
    harmed = point.get("user_gains", {}).get("share_harmed")
    answered = {metric: (found["low"], found["high"]) for metric, found in (personal or population)["intervals"].items()}
    return RunLine(run, protocol, point.get("examples"), point["users"], point["rows"], harmed, metrics, answered, digest)


def _page(names: Sequence[str], lines: Sequence[RunLine]) -> str:
    metrics = list(dict.fromkeys(metric for line in lines for metric in line.metrics))
    head = [*COLUMNS, *(f"{METRICS[name]} {what}" for name in metrics for what in ("without user", "with user", "gain")), "users harmed"]
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in _cells(line, metrics))}</tr>" for line in lines)
    table = f"<table><tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>{body}</table>"
    footnote = "Gains are paired on the same rows within a run, with 95 % intervals; runs may differ in their rows."
    return page("Runs compared", _verdict(lines), f"<p>{escape(', '.join(names))}</p>", [table], footnote)


def _verdict(lines: Sequence[RunLine]) -> str:
    """Who is best where they can be compared: the same protocol, the same rows."""
    said = []
    for protocol in dict.fromkeys((line.protocol, line.examples) for line in lines):
        group = [line for line in lines if (line.protocol, line.examples) == protocol]
        metric = next(iter(group[0].metrics))
        loss = "nll" if "nll" in group[0].metrics else metric
        if len(group) < 2 or len({(line.rows, line.digest) for line in group}) > 1 or group[0].digest is None:
            continue
        best = min(group, key=lambda line: _answered(line, loss))
        near = [line.run for line in group if line is not best and _answered(line, loss) <= best.answered[loss][1]]
        after = f" after {examples_told(protocol[1])}" if protocol[1] else ""
        text = f"{protocol[0]}{after}: {best.run} has the lowest {METRICS[loss]} ({_answered(best, loss):.4g})"
        said.append(f"{text}; within its interval {'lies' if len(near) == 1 else 'lie'} {', '.join(near)}." if near else f"{text}.")
    return " ".join(said) or "These runs have no protocol on the same rows, so nothing is ranked."


def _answered(line: RunLine, metric: str) -> float:
    without, personal, *_ = line.metrics[metric]
    return without if personal is None else personal


def _cells(line: RunLine, metrics: Sequence[str]) -> list[str]:
    cells = [line.run, line.protocol, "" if line.examples is None else str(line.examples), f"{line.users:,}", f"{line.rows:,}"]
    for metric in metrics:
        without, personal, gain, interval = line.metrics.get(metric, (None, None, None, None))
        cells += ["" if value is None else f"{value:.4f}" for value in (without, personal)]
        cells.append("" if gain is None or interval is None else f"{gain:+.4f} ({interval[0]:+.4f} to {interval[1]:+.4f})")
    return [*cells, "" if line.harmed is None else f"{100 * line.harmed:.1f} %"]
