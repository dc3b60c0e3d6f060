"""All figures of training, each from a process of its own.

python -m benchmarks.train [--quick] --json
"""

from __future__ import annotations

import subprocess
import sys
from typing import Annotated

import typer

PARTS = ("step", "bucketing", "zero3_bytes", "users")


def main(
    quick: Annotated[bool, typer.Option("--quick", help="A few minutes in all.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Run every part; a part that fails ends the run."""
    options = [*(["--quick"] if quick else []), *(["--json"] if as_json else [])]
    for part in PARTS:
        subprocess.run([sys.executable, "-m", f"benchmarks.{part}", *options], check=True)


if __name__ == "__main__":
    typer.run(main)
