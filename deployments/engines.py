"""Keeping a process on the generations that serve: load beside, swap at once, drain the old.

Knows the store and engines; knows no HTTP and no Ray.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from plora_ray.config import Settings
from plora_ray.errors import PloraError, StoreError
from plora_ray.inference import LoadedGeneration
from plora_ray.inference.opening import open_for_serving
from plora_ray.opening import open_store
from plora_ray.store import AdapterStore
from plora_ray.store.canary import Canary

log = logging.getLogger(__name__)

Built = TypeVar("Built")


@dataclass(frozen=True)
class Served(Generic[Built]):
    """A loaded generation and what was built around it."""

    loaded: LoadedGeneration
    built: Built

    @property
    def name(self) -> str:
        """The generation's id."""
        return self.loaded.name


@dataclass(frozen=True)
class Serving(Generic[Built]):
    """What answers: the current generation, and for the users whom `canary` takes the one that is tried out."""

    current: Served[Built]
    canary: Canary | None = None
    tried: Served[Built] | None = None

    def for_users(self, keys: Iterable[bytes]) -> Served[Built]:
        """The one generation that answers these users together: the one tried out only if all of them are in its share."""
        if self.canary is None or self.tried is None:
            return self.current
        return self.tried if all(self.canary.takes(key) for key in keys) else self.current

    @property
    def all(self) -> list[Served[Built]]:
        return [self.current] if self.tried is None else [self.current, self.tried]


class CurrentGeneration(Generic[Built]):
    """Holds what `build` makes of the generations that the store says serve, and follows it.

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
        self._serving: Serving[Built] | None = None
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
            self._store = open_store(self._settings.store)
        return self._store

    @property
    def ready(self) -> bool:
        """Whether a generation is loaded."""
        return self._serving is not None

    def get(self) -> Serving[Built]:
        """What answers now. Raises StoreError before a generation is loaded."""
        serving = self._serving
        if serving is None:
            raise StoreError("no generation is loaded yet")
        return serving

    def follow(self) -> None:
        """Look at the store once: new erasures first, then which generations serve. Failures are logged, what serves stays."""
        self._attempt(self.learn_erasures)
        with self._changing:
            self._attempt(self._take_up_current)
            if self._serving is not None:
                self._attempt(self._take_up_canary)

    def learn_erasures(self) -> None:
        """Forget users erased since the last look. Raises StoreError. Never waits for a generation that is being loaded."""
        known = self.store.tombstones()
        # By version: a user who was erased, came back and was erased again is newly erased.
        new = {key for key, version in known.items() if self._erased.get(key) != version}
        if new and self._serving is not None:
            for served in self._serving.all:
                self._on_erased(served.built, new)
        self._erased = known

    def close(self) -> None:
        """Stop following and retire what serves."""
        self._stop.set()
        if self._serving is not None:
            for served in self._serving.all:
                self._retire(served.built)

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
                serving = self._serving.current.name if self._serving else "no generation"
                log.warning("still on %s: %s", serving, error, exc_info=None if isinstance(error, PloraError) else error)

    def _take_up_current(self) -> None:
        current = self.store.current()
        standing = self._serving
        if current is None or (standing is not None and standing.current.name == current):
            return
        if standing is not None and standing.tried is not None and standing.tried.name == current:
            self._swap(Serving(standing.tried))  # the canary proved itself: it is loaded already
        else:
            served = self._load(current)
            self._swap(Serving(served) if standing is None else Serving(served, standing.canary, standing.tried))
        log.info("generation %s serves", current)

    def _take_up_canary(self) -> None:
        serving, canary = self.get(), self.store.canary()
        if canary == serving.canary:
            return
        if canary is None or canary.generation == serving.current.name:
            self._swap(Serving(serving.current))
        elif serving.tried is not None and serving.tried.name == canary.generation:
            self._swap(Serving(serving.current, canary, serving.tried))  # another share
        else:
            self._swap(Serving(serving.current))  # before the next is loaded: at most two are held
            self._swap(Serving(serving.current, canary, self._load(canary.generation)))
        log.info("canary: %s", f"generation {canary.generation} for {canary.share:.2%} of the users" if canary else "none")

    def _load(self, generation: str) -> Served[Built]:
        loaded = open_for_serving(self.store, generation, self._settings.serving)
        return Served(loaded, self._build(loaded))

    def _swap(self, serving: Serving[Built]) -> None:
        """From now on `serving` answers; what it doesn't hold is retired."""
        old, self._serving = self._serving, serving
        for served in [] if old is None else old.all:
            if all(served is not held for held in serving.all):
                self._retire(served.built)
