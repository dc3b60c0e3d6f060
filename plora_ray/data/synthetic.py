"""Users who disagree: a made-up population with latent tastes whose best reachable accuracy is known.

A text praises or damns a film ("a superb remake") and names aspects of it, each in one of two directions ("a happy
ending", "a bitter ending"). A user's taste weighs every aspect; it comes from a few latent factors shared by the
population plus a small personal part, so what is learned from some users helps with others. Some users like most films,
some few: generosity g_u. With attributes a in {-1, 0, 1}^A and verdict v in {-2, -1, 1, 2} of the text,

    P(like) = sigmoid(sharpness * (t_u . a + VERDICT_WEIGHT * v + g_u))

Everything follows from the parameters: any user and any text can be generated alone and in any order. The file knows
nothing about files, partitions or models.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import parse_qsl

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from plora_ray.data.rows import SPLITS, SplitName
from plora_ray.errors import DataError

ASPECTS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("plenty of jokes", "sharp comic timing", "very funny scenes", "a silly sense of humour"),
     ("hardly a joke", "a grave and serious tone", "no humour at all", "a solemn mood")),
    (("brutal fights", "a lot of blood", "shocking violence", "savage battles"),
     ("no violence at all", "gentle and peaceful scenes", "hardly a raised voice", "a calm and harmless story")),
    (("a tender love story", "a passionate romance", "two lovers at its heart", "long romantic evenings"),
     ("no romance whatsoever", "not a single kiss", "no love story", "friends who never fall in love")),
    (("a breathless pace", "rapid cuts", "nonstop action", "a very fast plot"),
     ("a slow build-up", "long quiet shots", "an unhurried pace", "hardly any action")),
    (("a happy ending", "a joyful finale", "a hopeful last scene", "everything turning out well"),
     ("a tragic ending", "a bitter finale", "a hopeless last scene", "everything ending in tears")),
    (("a loud orchestral score", "songs in every scene", "booming music", "big musical numbers"),
     ("no music at all", "an almost silent soundtrack", "only natural sounds", "long stretches of silence")),
    (("dragons and magic", "alien worlds", "a fantastic fairy-tale setting", "ghosts and wizards"),
     ("a realistic setting", "ordinary everyday life", "true historical events", "a documentary look")),
    (("a three-hour running time", "an epic length", "many long chapters", "a very long story"),
     ("a short running time", "barely an hour of film", "a brief and compact story", "very few scenes")),
)  # fmt: skip
SUBJECTS = ("film", "debut", "thriller", "classic", "sequel", "festival winner", "studio film", "adaptation", "remake", "drama")
VERDICTS: tuple[tuple[int, tuple[str, ...]], ...] = (
    (2, ("superb", "brilliant", "wonderful")),
    (1, ("solid", "decent", "good")),
    (-1, ("mediocre", "flat", "weak")),
    (-2, ("awful", "terrible", "dreadful")),
)
ASPECTS_PER_TEXT = 2
LATENT_FACTORS = 2
TASTE_SCALE = 0.35  # standard deviation of a user's weight of an aspect
PERSONAL_SHARE = 0.1  # of the taste's variance: what no other user tells anything about
GENEROSITY_SCALE = 1.0  # standard deviation of g_u
VERDICT_WEIGHT = 0.4  # what everybody agrees on: it lifts the user-blind ceiling above one half
MAX_POPULATION_FOR_CEILINGS = 20_000  # users are drawn alike, so this many tell the ceilings to three digits

# Streams of the random generator: the same (seed, index) must not give a text and a user the same numbers.
_TASTES, _TEXTS, _USERS = 0, 1, 2


class SyntheticParams(BaseModel):
    """The query of `synthetic://?users=1000&texts=16&seed=0`.

    `texts` is the number of texts each user rates, `pool` the number of different texts in the population (users share
    them), `sharpness` how decided the answers are.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    users: int = Field(1000, ge=1)
    texts: int = Field(16, ge=3)
    seed: int = Field(0, ge=0, lt=2**32)
    pool: int = Field(500, ge=10)
    sharpness: float = Field(3.0, gt=0)

    @classmethod
    def from_url(cls, url: str) -> SyntheticParams:
        """Parse `synthetic://[?key=value&...]`. Raises DataError naming the key and the valid ones."""
        scheme, _, rest = url.partition("://")
        place, _, query = rest.partition("?")
        if scheme != "synthetic" or place:
            raise DataError(f"{url!r} is not a synthetic source: write synthetic://?users=1000&texts=16&seed=0")
        try:
            params = cls.model_validate(dict(parse_qsl(query, keep_blank_values=True)))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise DataError(f"{url!r}: {key}: {first['msg']} (valid keys: {', '.join(cls.model_fields)})") from None
        texts_by_split = _pool(params).by_split
        if any(count > len(texts_by_split[split]) for split, count in _rows_by_split(params.texts).items()):
            raise DataError(f"{url!r}: too few different texts for texts={params.texts} a user: use pool={4 * params.texts} or more")
        return params


@dataclass(frozen=True, slots=True)
class SyntheticRow:
    """One answer of a made-up user."""

    user_id: str
    text: str
    label: str  # "like" or "dislike"
    split: SplitName


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The best accuracy on the test rows that any predictor can expect, knowing the user's taste and not knowing it."""

    with_user: float
    without_user: float


@dataclass(frozen=True)
class _Pool:
    """The texts of a population; text indices of each split.

    attributes: [pool, aspects + 2]: the aspects in {-1, 0, 1}, the verdict, and a constant one (for the generosity).
    """

    texts: tuple[str, ...]
    index_of: dict[str, int]
    attributes: NDArray[np.float64]
    by_split: dict[SplitName, NDArray[np.int64]]


def rows_of_user(params: SyntheticParams, user_index: int) -> list[SyntheticRow]:
    """Return the user's `params.texts` rows over different texts, with train, validation and test rows for everybody."""
    pool = _pool(params)
    chosen, likes = _answers(params, user_index)
    user_id = f"user-{user_index:05d}"
    splits = [split for split, count in _rows_by_split(params.texts).items() for _ in range(count)]
    return [
        SyntheticRow(user_id, pool.texts[index], "like" if like else "dislike", split)
        for index, like, split in zip(chosen, likes, splits, strict=True)
    ]


def new_user(params: SyntheticParams, index: int) -> list[SyntheticRow]:
    """Return the rows of the `index`-th user beyond the population, drawn from the same tastes but not in the data."""
    return rows_of_user(params, params.users + index)


def true_probability(params: SyntheticParams, user_index: int, text: str) -> float:
    """Return P(like) of a user for a text of the pool. Raises DataError for any other text."""
    pool = _pool(params)
    if text not in pool.index_of:
        raise DataError("the text isn't one of this synthetic population's pool: take it from rows_of_user or new_user")
    logit = params.sharpness * pool.attributes[pool.index_of[text]] @ _taste(params, user_index)
    return float(_sigmoid(logit))


def ceilings(params: SyntheticParams) -> Ceilings:
    """Return the expected accuracy of the best predictors on the test rows.

    With the user: the mean of max(p, 1 - p). Without: for each text, the better of the two labels by the mean p of the
    population. Populations above 20,000 users are represented by their first 20,000.
    """
    pool, users = _pool(params), min(params.users, MAX_POPULATION_FOR_CEILINGS)
    tests = _rows_by_split(params.texts)["test"]
    mean_like = np.zeros(params.pool)
    rows = np.empty((users, tests), np.int64)  # the texts of each user's test rows
    probabilities = np.empty((users, tests))
    for user in range(users):
        likes = _sigmoid(params.sharpness * pool.attributes @ _taste(params, user))
        mean_like += likes / users
        rows[user] = _answers(params, user)[0][-tests:]
        probabilities[user] = likes[rows[user]]
    blind_says_like = mean_like[rows] >= 0.5
    return Ceilings(
        with_user=float(np.maximum(probabilities, 1 - probabilities).mean()),
        without_user=float(np.where(blind_says_like, probabilities, 1 - probabilities).mean()),
    )


def _rows_by_split(texts: int) -> dict[SplitName, int]:
    """How many of a user's rows go to each split; in the order of `SPLITS`."""
    validation = max(1, round(0.125 * texts))
    test = max(1, round(0.25 * texts))
    return {"train": texts - validation - test, "validation": validation, "test": test}


@lru_cache(maxsize=4)
def _pool(params: SyntheticParams) -> _Pool:
    """The texts everybody rates: different from one another, each wholly in one split."""
    texts: dict[str, int] = {}
    attributes = np.ones((params.pool, len(ASPECTS) + 2))
    attributes[:, :-1] = 0
    rng = np.random.default_rng((params.seed, _TEXTS))
    while len(texts) < params.pool:
        aspects = rng.permutation(len(ASPECTS))[:ASPECTS_PER_TEXT]
        towards = rng.integers(2, size=ASPECTS_PER_TEXT)
        phrases = [ASPECTS[aspect][1 - way][rng.integers(4)] for aspect, way in zip(aspects, towards, strict=True)]
        verdict, words = VERDICTS[rng.integers(len(VERDICTS))]
        word, subject = words[rng.integers(len(words))], SUBJECTS[rng.integers(len(SUBJECTS))]
        text = f"{'An' if word[0] in 'aeiou' else 'A'} {word} {subject} with {' and '.join(phrases)}."
        if text not in texts:
            attributes[len(texts), aspects] = 2 * towards - 1
            attributes[len(texts), len(ASPECTS)] = verdict
            texts[text] = len(texts)
    place = np.arange(params.pool) % 10
    by_split: dict[SplitName, NDArray[np.int64]] = {
        "train": np.flatnonzero(place < 6),
        "validation": np.flatnonzero((place >= 6) & (place < 8)),
        "test": np.flatnonzero(place >= 8),
    }
    return _Pool(tuple(texts), texts, attributes, by_split)


@lru_cache(maxsize=4)
def _loadings(seed: int) -> NDArray[np.float64]:
    """How the latent factors make up the aspects' weights: [factors, aspects], columns of length one."""
    loadings: NDArray[np.float64] = np.random.default_rng((seed, _TASTES)).normal(size=(LATENT_FACTORS, len(ASPECTS)))
    loadings /= np.linalg.norm(loadings, axis=0, keepdims=True)
    return loadings


def _taste(params: SyntheticParams, user_index: int) -> NDArray[np.float64]:
    """What the user makes of the attributes of a text: [aspects + 2]."""
    rng = np.random.default_rng((params.seed, _USERS, user_index))
    latent, personal = rng.normal(size=LATENT_FACTORS), rng.normal(size=len(ASPECTS))
    taste = TASTE_SCALE * (np.sqrt(1 - PERSONAL_SHARE) * latent @ _loadings(params.seed) + np.sqrt(PERSONAL_SHARE) * personal)
    return np.concatenate([taste, [VERDICT_WEIGHT, GENEROSITY_SCALE * rng.normal()]])


def _answers(params: SyntheticParams, user_index: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The indices of the texts the user rates, in the order of `SPLITS`, and whether the user likes them."""
    pool, counts = _pool(params), _rows_by_split(params.texts)
    rng = np.random.default_rng((params.seed, _USERS, user_index, 1))
    chosen = np.concatenate([rng.choice(pool.by_split[split], counts[split], replace=False) for split in SPLITS])
    probability = _sigmoid(params.sharpness * pool.attributes[chosen] @ _taste(params, user_index))
    return chosen, rng.random(params.texts) < probability


def _sigmoid(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1 / (1 + np.exp(-logits))
