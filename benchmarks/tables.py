"""Runs the benchmarks and writes their figures into the tables of docs/benchmarks.md, with command, machine and date.

    python -m benchmarks.tables [--quick] [train serve ...]

A table stands between `<!-- figures: NAME -->` and `<!-- end -->`; everything else in the page stays as it is.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

SUITES = ("train", "serve")


def main(
    suites: Annotated[list[str] | None, typer.Argument(help="Which to run; all of them by default.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few minutes each.")] = False,
    page: Annotated[Path, typer.Option(help="The page whose tables are rewritten.")] = Path("docs/benchmarks.md"),
) -> None:
    """Run, then rewrite the page once per suite, so that a long run that is cut short keeps what it has."""
    for name in suites or SUITES:
        command = [sys.executable, "-m", f"benchmarks.{name}", *(["--quick"] if quick else []), "--json"]
        figures = run(command)
        page.write_text(rewrite(page.read_text(), name, table(figures, f"python -m benchmarks.{name}{' --quick' if quick else ''} --json")))


def run(command: list[str]) -> list[dict[str, Any]]:
    """The figures a benchmark prints, shown as they come."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    figures = []
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        if line.startswith("{"):
            figures.append(json.loads(line))
    if process.wait() != 0:
        raise SystemExit(f"{' '.join(command)} failed")
    return figures


def table(figures: list[dict[str, Any]], command: str) -> str:
    """Markdown: the command, where and when it ran, and a row a figure."""
    rows = [f"| {f['figure']} | {f['value']} | {f['low']} to {f['high']} | {f['unit']} | {f['goal'] or ''} |" for f in figures]
    where = f"{os.cpu_count()} CPU cores ({platform.machine()}), {time.strftime('%Y-%m-%d')}"
    return "\n".join([f"    {command}", "", f"{where}.", "", "| figure | value | spread | unit | goal |", "|---|---|---|---|---|", *rows])


def rewrite(page: str, name: str, body: str) -> str:
    """The page with the suite's table replaced. Exits if the page has no place for it."""
    pattern = re.compile(rf"(<!-- figures: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(page):
        raise SystemExit(f"the page has no '<!-- figures: {name} -->' ... '<!-- end -->' to write to")
    return pattern.sub(lambda found: f"{found[1]}\n{body}\n\n{found[2]}", page)


if __name__ == "__main__":
    typer.run(main)
