"""The rows an evaluation uses, read in this process by the rules of training: validated, filtered, split by the same hash.

Rows stream through; what stays are test rows (each different text once), label counts, and a few training examples of every
user outside the generation. Users are numbers and keys from here on. Knows no model and no metric.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import numpy as np
from numpy.typing import NDArray

from plora_ray.adapters.labels import LabelSpace
from plora_ray.data.rows import BadRow, Row
from plora_ray.data.source_settings import SourceSettings
from plora_ray.data.sources import list_units, read_unit
from plora_ray.data.splits import hash_of_words
from plora_ray.data.units import ReadUnit
from plora_ray.errors import DataError
from plora_ray.evaluation.baselines import LabelHistory
from plora_ray.evaluation.labelled import LabelledTexts
from plora_ray.store import AdapterStore, GenerationReader

BAD_ROWS_SHOWN = 20
MOST_GROUPS = 100  # more are names of users or texts, which a report mustn't hold

OnUnit = Callable[[int, int], None]  # units read, units in all


@dataclass(frozen=True)
class EvaluationRows:
    """Test rows and what may be known beside them. Row i is text `row_texts[i]` of user `row_users[i]`.

    texts: different texts of test rows. labels: [rows] class indices, or values of a regression. keys, known: by user, his
    key and whether the generation trained an adapter for him. history: the labels of training rows of the generation's users (of all
    users if the data has none of those). examples: by user outside the generation, up to `examples_kept` training rows (text, label) in an
    order drawn for each user. groups: names of the
    groups that test rows belong to; row_groups: [rows] index into them, -1 for none. row_times: [rows] in UTC, NaT where not given.
    training, validation: those rows of the generation's users, if they were asked for. learnt_texts: how many test rows have a text that
    training or validation rows have, too (`hash_of_words`). digest: 16 hex digits of what is asked: every user's test rows and examples,
    and whether the generation knows him, in any order and without names. divided: whether the settings made rows test rows.
    """

    texts: list[str]
    row_texts: NDArray[np.int64]
    row_users: NDArray[np.int64]
    labels: NDArray[np.number]
    keys: list[bytes]
    known: NDArray[np.bool_]
    history: LabelHistory
    examples: dict[int, list[tuple[str, str | float]]]
    train_rows: int
    erased_users: int
    bad_rows: int
    groups: list[str]
    row_groups: NDArray[np.int64]
    row_times: NDArray[np.datetime64]
    training: LabelledTexts | None = None
    validation: LabelledTexts | None = None
    learnt_texts: int = 0
    digest: str = ""
    divided: bool = False


def read_rows(
    settings: SourceSettings,
    store: AdapterStore,
    reader: GenerationReader,
    labels: LabelSpace,
    *,
    examples_kept: int,
    on_unit: OnUnit,
    keep_training: bool = False,
    leave_out_learnt: bool = False,
) -> EvaluationRows:
    """Read the whole source once. keep_training: keep the training and validation rows of the generation's users, all of them in memory.
    leave_out_learnt: leave out test rows whose text training or validation rows have, too.

    A row with a label that the generation doesn't know is a bad row. Raises DataError for an unusable source and for bad rows (unless
    they are skipped).
    """
    collector = _Collector(store, reader, settings.split_seed, examples_kept, keep_training)
    bad: list[BadRow] = []
    with_split: set[bool] = set()
    units, division = list_units(settings), settings.split_rules()
    for done, unit in enumerate(units, start=1):
        for checked, has_split in _checked(unit, settings, labels):
            if isinstance(checked, BadRow):
                bad.append(checked)
                if settings.on_bad_row == "stop" and len(bad) == BAD_ROWS_SHOWN:
                    raise DataError(_describe(bad))
                continue
            with_split.add(has_split)
            collector.add(checked, division.of(checked))
        on_unit(done, len(units))
    if bad and settings.on_bad_row == "stop":
        raise DataError(_describe(bad))
    if len(with_split) == 2:
        raise DataError(f"some files of {settings.shown} have a split column, others don't: give it in all or set columns.split: null")
    divided = settings.split_times is not None or with_split == {False}
    return collector.finish(labels, leave_out_learnt, bad_rows=len(bad), divided=divided)


def _checked(unit: ReadUnit, settings: SourceSettings, labels: LabelSpace) -> Iterator[tuple[Row | BadRow, bool]]:
    """Every row of a unit, and whether the unit says itself which split a row is in."""
    rules, classes = settings.row_rules(labels.task), frozenset(labels.classes)
    for raw in read_unit(unit, settings):
        for checked in rules.check(raw):
            if isinstance(checked, BadRow):
                yield checked, raw.splits is not None
                continue
            number, row = checked
            unknown = labels.task == "classification" and row.label not in classes
            yield (BadRow(raw.file, number, labels.not_one(str(row.label))) if unknown else row), raw.splits is not None


def _describe(bad: Sequence[BadRow]) -> str:
    head = f"bad rows ({len(bad)} shown): correct them, or leave them out with data.on_bad_row: skip"
    return "\n".join([head, *(str(row) for row in bad)])


@dataclass(eq=False)
class _Collector:
    """Takes rows one by one and keeps of them what an evaluation needs."""

    store: AdapterStore
    reader: GenerationReader
    split_seed: int
    examples_kept: int
    keep_training: bool
    rows: int = 0
    train_rows: int = 0
    _training: list[tuple[int, str, str | float]] = field(default_factory=list)
    _validation: list[tuple[int, str, str | float]] = field(default_factory=list)
    _learnt_words: array[int] = field(default_factory=lambda: array("Q"))
    _test_words: array[int] = field(default_factory=lambda: array("Q"))
    _test_digests: list[int] = field(default_factory=list)
    _users: dict[str, int | None] = field(default_factory=dict)  # None: erased, so nothing of his is looked at
    _keys: list[bytes] = field(default_factory=list)
    _known: list[bool] = field(default_factory=list)
    _texts: dict[str, int] = field(default_factory=dict)
    _tests: list[tuple[int, int, str | float]] = field(default_factory=list)
    _groups: dict[str, int] = field(default_factory=dict)
    _test_groups: list[int] = field(default_factory=list)
    _test_times: list[datetime | None] = field(default_factory=list)
    _history: Counter[tuple[int, str | float]] = field(default_factory=Counter)
    _examples: dict[int, list[tuple[int, int, str, str | float]]] = field(default_factory=dict)

    def add(self, row: Row, split: str) -> None:
        self.rows += 1
        user = self._user(row.user_id)
        if user is None:
            return
        (self._test_words if split == "test" else self._learnt_words).append(hash_of_words(row.text, self.split_seed))
        if split == "test":
            self._test_digests.append(_digest_of("test", row.text, row.label))
            self._tests.append((self._texts.setdefault(row.text, len(self._texts)), user, row.label))
            self._test_groups.append(-1 if row.group is None else self._groups.setdefault(row.group, len(self._groups)))
            self._test_times.append(None if row.timestamp is None else row.timestamp.replace(tzinfo=None))
            if len(self._groups) > MOST_GROUPS:
                raise DataError(f"columns.group has more than {MOST_GROUPS} different values: name a column of few, or none")
        elif split == "train":
            self.train_rows += 1
            self._history[user, row.label] += 1
            if not self._known[user]:
                self._offer_example(user, row)
            elif self.keep_training:
                self._training.append((user, row.text, row.label))
        elif self.keep_training and self._known[user]:
            self._validation.append((user, row.text, row.label))

    def finish(self, labels: LabelSpace, leave_out_learnt: bool, *, bad_rows: int, divided: bool) -> EvaluationRows:
        learnt = np.isin(self._test_words, self._learnt_words)
        kept = np.flatnonzero(~learnt) if leave_out_learnt else np.arange(len(self._tests))
        tests = [self._tests[place] for place in kept]
        asked, row_texts = np.unique(np.array([text for text, _, _ in tests], np.int64), return_inverse=True)
        texts = list(self._texts)
        return EvaluationRows(
            texts=[texts[place] for place in asked],
            row_texts=row_texts,
            row_users=np.array([user for _, user, _ in tests], np.int64),
            labels=encode_labels([label for _, _, label in tests], labels),
            keys=self._keys,
            known=np.array(self._known, bool),
            history=self._label_history(labels),
            examples={user: [(text, label) for *_, text, label in sorted(kept, reverse=True)] for user, kept in self._examples.items()},
            train_rows=self.train_rows,
            erased_users=sum(user is None for user in self._users.values()),
            bad_rows=bad_rows,
            divided=divided,
            groups=list(self._groups),
            row_groups=np.array(self._test_groups, np.int64)[kept],
            row_times=np.array(self._test_times, "datetime64[us]")[kept],
            training=LabelledTexts.of_rows(self._training) if self.keep_training else None,
            validation=LabelledTexts.of_rows(self._validation) if self.keep_training else None,
            learnt_texts=int(learnt.sum()),
            digest=self._digest(kept.tolist()),
        )

    def _user(self, user_id: str) -> int | None:
        if user_id not in self._users:
            key = self.store.key(user_id)
            if self.reader.erased_version(key) is not None:
                self._users[user_id] = None
            else:
                self._users[user_id] = len(self._keys)
                self._keys.append(key)
                self._known.append(self.reader.lookup(key) is not None)
        return self._users[user_id]

    def _offer_example(self, user: int, row: Row) -> None:
        """Keep the rows whose hash is smallest: a draw that doesn't depend on the order of the source, which may be by label, and that is
        each user's own where users share texts."""
        kept = self._examples.setdefault(user, [])
        entry = (-_digest_of(self.split_seed, row.user_id, row.text), -self.rows, row.text, row.label)
        if len(kept) < self.examples_kept:
            heapq.heappush(kept, entry)
        else:
            heapq.heappushpop(kept, entry)

    def _digest(self, tests: Sequence[int]) -> str:
        asked: Counter[int] = Counter()
        for place in tests:
            asked[self._tests[place][1]] += self._test_digests[place]
        seen = {user: sum(_digest_of("example", text, label) for *_, text, label in drawn) for user, drawn in self._examples.items()}
        people = sorted([asked[user] % 2**64, seen.get(user, 0) % 2**64, self._known[user]] for user in asked)
        return f"{_digest_of(people):016x}"

    def _label_history(self, labels: LabelSpace) -> LabelHistory:
        known = {pair: count for pair, count in self._history.items() if self._known[pair[0]]} or self._history
        pairs = list(known)
        return LabelHistory.of(
            np.array([user for user, _ in pairs], np.int64),
            encode_labels([label for _, label in pairs], labels),
            np.array(list(known.values()), np.int64),
            users=len(self._keys),
            outputs=labels.outputs,
            task=labels.task,
        )


def _digest_of(*values: object) -> int:
    """64 bits."""
    return int.from_bytes(hashlib.blake2b(json.dumps(values).encode(), digest_size=8).digest(), "big")


def encode_labels(given: Sequence[str | float], labels: LabelSpace) -> NDArray[np.number]:
    """Class indices int64, or a regression's values float64 in their own units. Raises DataError for an unknown class."""
    if labels.task == "regression":
        return np.array(given, np.float64)
    return labels.encode(given).numpy()
