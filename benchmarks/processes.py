"""What Ray's worker processes on this machine take."""

from __future__ import annotations

import psutil

MIB = 2**20


def pss(process: psutil.Process) -> float:
    """MiB of private and shared pages, the latter divided among those who share them; 0 for a process that has gone."""
    try:
        return float(process.memory_full_info().pss / MIB)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0.0


def cpu_seconds(process: psutil.Process) -> float:
    """Seconds of processor time so far; 0 for a process that has gone."""
    try:
        times = process.cpu_times()
        return float(times.user + times.system)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0.0


def is_worker(process: psutil.Process, name: str = "") -> bool:
    """Whether it is a worker of Ray, of an actor or task whose name begins so."""
    try:
        return " ".join(process.cmdline()).startswith(f"ray::{name}")
    except psutil.NoSuchProcess:
        return False
