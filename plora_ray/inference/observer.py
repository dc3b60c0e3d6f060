"""What an engine tells of its work to whoever measures it: counts, times and reasons; never a user, never a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

# Where a row's adapter was found. unknown: the user is remembered to have none. none: the store was asked and has none.
Tier = Literal["resident", "memory", "disk", "store", "unknown", "none"]
# Why the population answered: the user has no adapter, or one of zeros, which is the population, or what kept the engine from it.
PopulationReason = Literal["no_adapter", "guarded", "store_unavailable", "adapter_corrupt"]


@dataclass(frozen=True)
class BatchDone:
    """One pass of the model: its rows, their tokens, the same padded to the longest row, each row's wait and the pass's own time."""

    rows: int
    tokens: int
    padded_tokens: int
    queue_s: Sequence[float]
    forward_s: float


class EngineObserver:
    """Told of everything an engine does; this one lets it pass. Called from several threads."""

    def on_lookups(self, tier: Tier, rows: int) -> None:
        """`rows` rows found their adapter, or that there is none, in `tier`."""

    def on_pull(self, seconds: float) -> None:
        """A user's adapter was fetched, or found missing, below memory."""

    def on_batch(self, batch: BatchDone) -> None:
        """The model has answered a batch."""

    def on_population(self, reason: PopulationReason, rows: int) -> None:
        """`rows` rows are answered by the population."""

    def on_resident(self, users: int) -> None:
        """The engine holds so many users' adapters in memory for good."""
