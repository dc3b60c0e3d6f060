"""Keeping a process on the store's current generation while it answers: load beside, swap at once, drain the old.

Knows the store and engines; knows no HTTP and no Ray.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from plora_ray.config import Settings
from plora_ray.errors import PloraError, StoreError
from plora_ray.inference import LoadedGeneration
from plora_ray.inference.opening import open_for_serving
from plora_ray.store import AdapterStore

log = logging.getLogger(__name__)

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
        self._complaints: dict[str, str] = {}
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
        """Look at the store once: new erasures first, then a new current generation. Failures are logged, what serves stays."""
        self._attempt(self.learn_erasures)
        with self._changing:
            self._attempt(self._take_up)

    def learn_erasures(self) -> None:
        """Forget users erased since the last look. Raises StoreError. Never waits for a generation that is being loaded."""
        known = self.store.tombstones()
        # By version: a user who was erased, came back and was erased again is newly erased.
        new = {key for key, version in known.items() if self._erased.get(key) != version}
        if new and self._serving is not None:
            self._on_erased(self._serving[1], new)
        self._erased = known

    def close(self) -> None:
        """Stop following and retire what serves."""
        self._stop.set()
        if self._serving is not None:
            self._retire(self._serving[1])

    def _watch(self) -> None:
        while not self._stop.wait(self._settings.serving.refresh_s):
            self.follow()

    def _attempt(self, step: Callable[[], None]) -> None:
        """Run a step; whatever goes wrong, this process must go on following. Each complaint is logged once."""
        try:
            step()
            self._complaints.pop(step.__name__, None)
        except Exception as error:
            if self._complaints.get(step.__name__) != str(error):
                self._complaints[step.__name__] = str(error)
                serving = self._serving[0].name if self._serving else "no generation"
                log.warning("still on %s: %s", serving, error, exc_info=None if isinstance(error, PloraError) else error)

    def _take_up(self) -> None:
        current = self.store.current()
        if current is None or (self._serving is not None and self._serving[0].name == current):
            return
        loaded = open_for_serving(self.store, current, self._settings.serving)
        built = self._build(loaded)
        old, self._serving = self._serving, (loaded, built)
        log.info("generation %s serves", current)
        if old is not None:
            self._retire(old[1])
