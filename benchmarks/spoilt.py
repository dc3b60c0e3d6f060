"""Ways in which a user's rows are not as they should be. Works on token ids and labels; knows no model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.population import UserRows

SHORT_TOKENS, LONG_TEXTS, MOST_TOKENS = 1, 8, 256

Change = Callable[[UserRows, list[UserRows], np.random.Generator], UserRows]


@dataclass(frozen=True)
class Spoil:
    """change: a user's rows, everybody's, and the draw -> the user's spoilt rows. share: of the users who are."""

    name: str
    share: float
    change: Change


def as_they_are(user: UserRows, everybody: list[UserRows], draw: np.random.Generator) -> UserRows:
    """Nothing is wrong."""
    return user


def noisy(chance: float) -> Change:
    """Each label that is learnt from is another class with this chance; test rows are right."""

    def change(user: UserRows, everybody: list[UserRows], draw: np.random.Generator) -> UserRows:
        return _relabelled(user, [place for place in _learnt(user) if draw.random() < chance], everybody, draw)

    return change


def one_class(user: UserRows, everybody: list[UserRows], draw: np.random.Generator) -> UserRows:
    """Rows of the user's most frequent class only, but for the test."""
    learnt = _learnt(user)
    most = Counter(user.labels[place] for place in learnt).most_common(1)[0][0]
    return user.take([place for place in range(len(user.labels)) if place not in learnt or user.labels[place] == most])


def short_texts(user: UserRows, everybody: list[UserRows], draw: np.random.Generator) -> UserRows:
    """Of every text only the first SHORT_TOKENS tokens, between the model's own marks."""
    return replace(user, ids=[[*ids[: 1 + SHORT_TOKENS], ids[-1]] for ids in user.ids])


def long_texts(user: UserRows, everybody: list[UserRows], draw: np.random.Generator) -> UserRows:
    """Every text followed by LONG_TEXTS texts of other people, which the label doesn't speak of."""

    def longer(ids: list[int]) -> list[int]:
        others = [everybody[who].ids for who in draw.integers(len(everybody), size=LONG_TEXTS)]
        more = [token for texts in others for token in texts[draw.integers(len(texts))][1:-1]]
        return [*ids[:-1], *more][: MOST_TOKENS - 1] + ids[-1:]

    return replace(user, ids=[longer(ids) for ids in user.ids])


def changed_taste(user: UserRows, everybody: list[UserRows], draw: np.random.Generator) -> UserRows:
    """The taste turned round in the middle of what is learnt from and stayed so: later rows, the test's too, have another class."""
    learnt = _learnt(user)
    return _relabelled(user, learnt[len(learnt) // 2 :] + user.of_split("test"), everybody, draw)


def _learnt(user: UserRows) -> list[int]:
    """Places of the rows to train and to validate, in this order."""
    return user.of_split("train") + user.of_split("validation")


def _relabelled(user: UserRows, places: list[int], everybody: list[UserRows], draw: np.random.Generator) -> UserRows:
    """Rows at `places` with another of all classes."""
    classes = sorted({label for someone in everybody for label in someone.labels})
    labels = list(user.labels)
    for place in places:
        labels[place] = str(draw.choice([name for name in classes if name != labels[place]]))
    return replace(user, labels=labels)


SPOILT = (
    Spoil("as they are", 0.0, as_they_are),
    Spoil("10 % label noise", 1.0, noisy(0.1)),
    Spoil("30 % label noise", 1.0, noisy(0.3)),
    Spoil("one class only", 0.25, one_class),
    Spoil("one-word texts", 0.25, short_texts),
    Spoil("very long texts", 0.25, long_texts),
    Spoil("changed taste", 0.25, changed_taste),
    Spoil("changed taste of most", 0.75, changed_taste),
)
