"""What ours gains over each predictor, data sets side by side, from what `benchmarks.quality` has kept.

python -m benchmarks.quality_summary var/quality/crehate var/quality/multipico
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.quality_table import lines_of_runs


def main(folders: Annotated[list[Path], typer.Argument(help="The --out of each data set.")]) -> None:
    """A table a protocol: predictors down, data sets across."""
    found = {folder.name: {_place(line): line for line in kept_lines(folder)} for folder in folders}
    everything = list(dict.fromkeys(place for lines in found.values() for place in lines))
    for protocol, examples in dict.fromkeys(place[:2] for place in everything):
        print(f"\n{protocol}-shot" + (f", {examples} examples" if examples else "") + "\n")
        print("| predictor | " + " | ".join(found) + " |\n" + "|---" * (len(found) + 1) + "|")
        for name in (place[2] for place in everything if place[:2] == (protocol, examples)):
            cells = [_cell(lines.get((protocol, examples, name))) for lines in found.values()]
            print(f"| {name} | " + " | ".join(cells) + " |")


def kept_lines(folder: Path) -> list[dict[str, Any]]:
    """Lines of the table over all seeds in a folder. Raises typer.BadParameter if it has none."""
    runs = [json.loads(path.read_text()) for path in sorted(folder.glob("seed-*.json"))]
    if not runs:
        raise typer.BadParameter(f"{folder} holds no seed that benchmarks.quality has finished")
    return lines_of_runs(runs)


def _place(line: dict[str, Any]) -> tuple[str, int | None, str]:
    return line["protocol"], line["examples"], line["predictor"]


def _cell(line: dict[str, Any] | None) -> str:
    """NLL of ours; of others what ours gains and p."""
    if line is None:
        return ""
    gain = line["gain"]
    return f"{line['nll']['mean']:.3f}" if gain is None else f"{gain['mean']:+.3f}, p {gain['p']:.2g}"


if __name__ == "__main__":
    typer.run(main)
