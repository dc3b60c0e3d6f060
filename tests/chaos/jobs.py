"""The training command under observation: started in a group of its own, watched through its store, and ended whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import psutil
import yaml

from plora_ray.config import load_settings
from plora_ray.data.sources import list_units, read_unit
from plora_ray.opening import open_store

Tree = dict[str, Any]
PATIENCE_S = 240.0


def write(tree: Tree, folder: Path) -> Path:
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def command(config: Path, *overrides: str) -> list[str]:
    sets = [part for override in overrides for part in ("--set", override)]
    return [sys.executable, "-m", "plora_ray.train_all", "--config", str(config), *sets]


class Job:
    """One start of the command. A context manager: at its end the driver and everything it started are gone."""

    def __init__(self, config: Path, *overrides: str, environment: Mapping[str, str] | None = None) -> None:
        self._log = config.with_suffix(f".{time.monotonic_ns()}.log")
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                command(config, *overrides), stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
                env={**os.environ, **(environment or {})},
            )  # fmt: skip

    @property
    def stderr(self) -> str:
        return self._log.read_text()

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert self.process.poll() is None, f"the job ended before {what}: {self.stderr[-2000:]}"
            assert time.monotonic() < deadline, f"no {what} in {PATIENCE_S:.0f} s: {self.stderr[-2000:]}"
            time.sleep(0.01)

    def published(self) -> dict[str, Any]:
        """The last line of a job that ends well."""
        out, _ = self.process.communicate(timeout=PATIENCE_S)
        assert self.process.returncode == 0, self.stderr[-3000:]
        result: dict[str, Any] = json.loads(out.splitlines()[-1])
        return result

    def error(self) -> str:
        """The one line of a job that ends in an error, checked to be one."""
        out, _ = self.process.communicate(timeout=PATIENCE_S)
        assert self.process.returncode == 1 and not out, (self.process.returncode, out, self.stderr[-3000:])
        first, *rest = self.stderr[self.stderr.index("error: ") :].strip().splitlines()
        assert not rest, self.stderr[-3000:]
        return first

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            driver = psutil.Process(self.process.pid)
            kill([driver, *driver.children(recursive=True)])  # a private cluster's processes have groups of their own
        if self.process.stdout:
            self.process.stdout.close()
        self.process.wait()


def kill(processes: list[psutil.Process]) -> None:
    """SIGKILL, and wait until they are gone."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=30)


def working_processes(root_pid: int) -> list[psutil.Process]:
    """The processes below `root_pid` that run a task or an actor of the job now."""
    return [process for process, title in _titled(root_pid) if title.startswith("ray::") and "IDLE" not in title and "Agent" not in title]


def training_workers(root_pid: int) -> list[psutil.Process]:
    """Those in which Ray Train runs ranks."""
    return [process for process, title in _titled(root_pid) if "RayTrainWorker" in title]


def _titled(root_pid: int) -> Iterator[tuple[psutil.Process, str]]:
    for process in psutil.Process(root_pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            yield process, " ".join(process.cmdline())


def segments(store: Path) -> set[str]:
    """Names of the finished waves."""
    return {path.stem for path in store.glob("generations/*/segments/*.safetensors")}


class FitLog:
    """Counts the fits of every wave in a file:// store while it is open: each writes the wave's outcome once, as a new file."""

    def __init__(self, store: Path) -> None:
        self._store = store
        self._versions: dict[str, set[tuple[int, int]]] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def fits(self, wave: str) -> int:
        return len(self._versions.get(wave, ()))

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            for path in self._store.glob("runs/*/waves/*.safetensors"):
                with contextlib.suppress(FileNotFoundError):
                    status = path.stat()
                    self._versions.setdefault(path.stem[:5], set()).add((status.st_ino, status.st_mtime_ns))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def assert_whole(config: Path, result: dict[str, Any]) -> None:
    """The generation serves every user of the data exactly once, and its manifest says so."""
    settings = load_settings(config)
    store = open_store(settings.store)
    reader = store.open_generation()
    users = {store.key(str(user)) for user in users_of(config)}
    keys = list(reader.keys())
    manifest = reader.manifest
    assert len(keys) == len(set(keys)) and set(keys) == users
    assert result["users"] == manifest.users == sum(segment.users for segment in manifest.segments) == len(users)
    assert result["generation"] == store.current() == manifest.generation
    assert result["examples"] == manifest.examples == train_rows_of(config)
    assert [info.path for info in store.objects.list("runs")] == []


def users_of(config: Path) -> set[str]:
    return {str(user) for rows in _raw(config) for user in rows.user_ids}


def train_rows_of(config: Path) -> int:
    return sum(1 for rows in _raw(config) for split in rows.splits or () if split == "train")


def _raw(config: Path) -> Iterator[Any]:
    data = load_settings(config).data
    for unit in list_units(data):
        yield from read_unit(unit, data)
