"""Memory that was freed, handed back to the system: a rank's size then follows what it holds, not how long it has run."""

from __future__ import annotations

import ctypes
from collections.abc import Callable


def _trim() -> Callable[[int], int] | None:
    """glibc's malloc_trim; None with other C libraries, whose allocators keep house themselves."""
    try:
        function: Callable[[int], int] = ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):
        return None
    return function


_malloc_trim = _trim()


def give_back_freed_memory() -> None:
    """Tensors of ever-changing sizes leave holes between blocks in use, which glibc keeps: call it between pieces of work of seconds."""
    if _malloc_trim is not None:
        _malloc_trim(0)
