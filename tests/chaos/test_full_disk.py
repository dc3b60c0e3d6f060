"""A store on a file system without room: one line that says so, nothing half-written, and the same command goes on once there is room."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from plora_ray.store import AdapterStore
from plora_ray.store.segments import decode_segment
from tests.chaos.jobs import assert_whole, write

NAMESPACE = ["unshare", "--mount", "--map-root-user"]
WAVES = "generations/*/segments/*.safetensors"


def may_mount(folder: Path) -> bool:
    folder.mkdir()
    trial = [*NAMESPACE, "mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    return shutil.which("unshare") is not None and subprocess.run(trial, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize(
    "pattern",
    [
        WAVES,
        pytest.param("runs/*/partitions/fragments-*/*", marks=pytest.mark.chaos),
        pytest.param("runs/*/partitions/partition-*", marks=pytest.mark.chaos),
        pytest.param("runs/*/population/*/users-*", marks=pytest.mark.chaos),
        pytest.param("generations/*/report.json", marks=pytest.mark.chaos),
    ],
)
def test_a_job_on_a_full_disk_says_so_shows_nothing_half_written_and_goes_on_after_room_was_made(
    many_waves: dict[str, Any], tmp_path: Path, pattern: str
) -> None:
    if not may_mount(tmp_path / "trial"):
        pytest.skip("this user may not mount a small file system, not even in a namespace of its own")
    many_waves["training"]["users_per_wave"] = 4
    config, store = write(many_waves, tmp_path), Path(many_waves["store"]["uri"])
    script = [sys.executable, "-m", "tests.chaos.small_disk", str(store), pattern, str(config)]
    ran = subprocess.run([*NAMESPACE, *script], capture_output=True, text=True, timeout=380, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    seen = json.loads(ran.stdout)
    first, second = seen["first"], seen["second"]
    lines = first["err"][first["err"].index("error: ") :].strip().splitlines()
    assert first["code"] == 1 and first["out"] == "" and len(lines) == 1, first
    assert "No space left on device" in lines[0] and str(store) in lines[0] and "free some space" in lines[0]
    assert not [path for path in seen["visible"] if "/." in path or path.endswith("manifest.json") or path == "current"]
    assert second["code"] == 0, second["err"]
    assert set(seen["fits"].values()) <= {1}, "a wave that was finished before the disk was full was fitted twice"

    many_waves["store"]["uri"] = f"{store}-copy"
    copied = tmp_path / "copied.yaml"
    copied.write_text(yaml.safe_dump(many_waves))
    assert_whole(copied, json.loads(second["out"].splitlines()[-1]))
    generation = AdapterStore.open(f"{store}-copy").current()
    for path in Path(f"{store}-copy", "generations", str(generation), "segments").iterdir():
        decode_segment(path.read_bytes(), path.name)
