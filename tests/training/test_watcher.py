"""The thread that watches a job: nothing that fails in it ends it, or stands before the reason why the training stopped."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from plora_ray.errors import PloraError
from plora_ray.store import ObjectStore
from plora_ray.training import watcher
from plora_ray.training.progress import ProgressLine, Snapshot, StepPoint
from plora_ray.training.telemetry import Sample, Telemetry
from plora_ray.training.telemetry.history import History
from plora_ray.training.watcher import Watcher

SNAPSHOT = Snapshot(
    step=1, steps=9, loss=0.5, starts=1, ranks=1, sharding="replicated", parameter_bytes=8, parameter_bytes_held={0: 8},
    points=[StepPoint(1, 0.5, 0.1)],
)  # fmt: skip


class BrokenLine(ProgressLine):
    """A terminal that is gone."""

    def say(self, text: str) -> None:
        raise BrokenPipeError("standard error is closed")


class KeptLine(ProgressLine):
    """Keeps its lines, and can't draw."""

    def __init__(self) -> None:
        super().__init__()
        self.lines = list[str]()

    def say(self, text: str) -> None:
        self.lines.append(text)

    def show(self, snapshot: Snapshot) -> None:
        raise RuntimeError("no bar")


class BrokenTelemetry(Telemetry):
    def write(self, samples: Sequence[Sample]) -> None:
        raise KeyError("a bug")


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A board that answers at once, in this process, and counts how often it was asked."""
    asked = threading.Semaphore(0)

    def snapshot(points_seen: int) -> Snapshot:
        asked.release()
        return SNAPSHOT

    monkeypatch.setattr(watcher, "POLL_S", 0.001)
    monkeypatch.setattr(watcher.ray, "get", lambda value, timeout: value)
    return SimpleNamespace(snapshot=SimpleNamespace(remote=snapshot), asked=asked)


def test_a_closed_terminal_ends_neither_the_thread_nor_the_history_nor_hides_the_failure(board: SimpleNamespace) -> None:
    history = History(ObjectStore("memory://watcher-terminal"), "runs/a")
    with pytest.raises(PloraError, match="out of memory"), Watcher(board, BrokenLine(), Telemetry([], print), history, 0):
        for _ in range(3):  # the thread looks again and again
            assert board.asked.acquire(timeout=20)
        raise PloraError("training stopped: out of memory")
    assert [sample.step for sample in history.samples] == [1] and len(history.starts) == 1


def test_what_fails_while_watching_is_warned_of_once(board: SimpleNamespace) -> None:
    for name, telemetry, reason in (("show", Telemetry([], print), "no bar"), ("telemetry", BrokenTelemetry([], print), "a bug")):
        line = KeptLine()
        with Watcher(board, line, telemetry, History(ObjectStore(f"memory://watcher-{name}"), "runs/a"), 0):
            for _ in range(3):
                assert board.asked.acquire(timeout=20)
            while not line.lines:
                time.sleep(0.001)
        warnings = [said for said in line.lines if said.startswith("warning: ")]
        assert len(warnings) == 1 and reason in warnings[0]
