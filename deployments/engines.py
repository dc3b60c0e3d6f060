"""Keeping a process on the store's current generation while it answers: load beside, swap at once, drain the old.

Knows the store and engines; knows no HTTP and no Ray.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

from plora_ray.config import Settings
from plora_ray.errors import PloraError, StoreError
from plora_ray.inference import LoadedGeneration, load_generation
from plora_ray.store import AdapterStore

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


Built = TypeVar("Built")


class CurrentGeneration(Generic[Built]):
    """Holds what `build` makes of the generation that the store says is current, and follows it.

    retire: called with what another generation replaced, or at the end. on_erased: called with the keys of users whose
    erasure was just learned of.
    """

    def __init__(
        self,
        settings: Settings,
        build: Callable[[LoadedGeneration], Built],
        *,
        retire: Callable[[Built], None] = lambda built: None,
        on_erased: Callable[[Built, set[bytes]], None] = lambda built, keys: None,
    ) -> None:
        self._settings, self._build, self._retire, self._on_erased = settings, build, retire, on_erased
        self._store: AdapterStore | None = None
        self._serving: tuple[LoadedGeneration, Built] | None = None
        self._erased: dict[bytes, str] = {}
        self._changing = threading.Lock()
        self._stop = threading.Event()
        self._complaint = ""
        self.follow()
        self._thread = threading.Thread(target=self._watch, name="generation-watch", daemon=True)
        self._thread.start()

    @property
    def store(self) -> AdapterStore:
        """The store. Raises StoreError while it can't be opened."""
        if self._store is None:
            settings = self._settings.store
            self._store = AdapterStore.open(settings.uri, settings.storage_options(), create=False)
        return self._store

    @property
    def ready(self) -> bool:
        """Whether a generation is loaded."""
        return self._serving is not None

    def get(self) -> tuple[LoadedGeneration, Built]:
        """The loaded generation and what was built around it. Raises StoreError before there is one."""
        serving = self._serving
        if serving is None:
            raise StoreError("no generation is loaded yet")
        return serving

    def follow(self) -> None:
        """Look at the store once: take up a new current generation and new erasures. Failures are logged, what serves stays."""
        with self._changing:
            try:
                self._take_up(self.store.current())
                self._learn_erasures()
                self._complaint = ""
            except PloraError as error:
                if str(error) != self._complaint:
                    self._complaint = str(error)
                    log.warning("still on %s: %s", self._serving[0].name if self._serving else "no generation", error)

    def close(self) -> None:
        """Stop following and retire what serves."""
        self._stop.set()
        if self._serving is not None:
            self._retire(self._serving[1])

    def _watch(self) -> None:
        while not self._stop.wait(self._settings.serving.refresh_s):
            self.follow()

    def _take_up(self, current: str | None) -> None:
        if current is None or (self._serving is not None and self._serving[0].name == current):
            return
        loaded = load_generation(self.store, current, dtype=DTYPES[self._settings.serving.dtype])
        built = self._build(loaded)
        old, self._serving = self._serving, (loaded, built)
        log.info("generation %s serves", current)
        if old is not None:
            self._retire(old[1])

    def _learn_erasures(self) -> None:
        if self._serving is None:
            return
        loaded, built = self._serving
        loaded.reader.refresh_tombstones()
        known = self.store.tombstones()
        # By version: a user who was erased, came back and was erased again is newly erased.
        new = {key for key, version in known.items() if self._erased.get(key) != version}
        if new:
            self._erased = known
            self._on_erased(built, new)
