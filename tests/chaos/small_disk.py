"""Runs the training command with its store on a small file system of its own, fills that up, makes room, and runs it again.

Has to be started in a mount namespace of its own (`unshare --mount --map-root-user`); prints what it saw as one JSON object.
A ballast file takes what is free as soon as a file that matches the pattern appears, so that the next write finds no room.

    python -m tests.chaos.small_disk STORE PATTERN CONFIG
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

from tests.chaos.jobs import FitLog, command, segments

SIZE = "64m"


def fill(ballast: Path) -> None:
    """Write until the disk is full to the last block."""
    with contextlib.suppress(OSError), ballast.open("ab", buffering=0) as file:
        block = b"\0" * 2**20
        while block:
            try:
                file.write(block)
            except OSError:
                if len(block) == 1:
                    raise
                block = block[: len(block) // 2]


def main(store: Path, pattern: str, config: Path) -> None:
    store.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", str(store)], check=True)
    ballast = store / "ballast"
    with FitLog(store) as log:
        start = [*command(config), "--set", "training.max_failures=0"]
        with subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as first:
            while not any(store.glob(pattern)) and first.poll() is None:
                time.sleep(0.002)
            fill(ballast)
            out, err = first.communicate(timeout=240)
        visible = [str(path.relative_to(store)) for path in store.rglob("*") if path.is_file() and path != ballast]
        finished = sorted(segments(store))
        ballast.unlink()
        second = subprocess.run(command(config), capture_output=True, text=True, timeout=240, check=False)
    subprocess.run(["cp", "-r", str(store), f"{store}-copy"], check=True)  # the mount ends with this namespace
    print(
        json.dumps(
            {
                "first": {"code": first.returncode, "out": out, "err": err[-4000:]},
                "second": {"code": second.returncode, "out": second.stdout, "err": second.stderr[-4000:]},
                "visible": visible,
                "finished": finished,
                "fits": {wave: log.fits(wave) for wave in finished},
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
