"""What several ranks find to last, by the rows of all of them: the same, whoever has judges."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from plora_ray.adapters.fit import Linearisation, UserPrior, solve_users
from plora_ray.adapters.forgetting import Forgetting
from plora_ray.adapters.labels import LabelSpace
from plora_ray.adapters.lasting import FORGETS, RATES, SHARES, SPREAD
from plora_ray.data.table import PartitionTable
from plora_ray.training.dates import newest_and_typical_age
from plora_ray.training.judging import with_what_lasts
from plora_ray.training.rank_rows import RankRows

RANKS, USERS, DAYS = 3, 8, 40
TRAINED_DAYS = DAYS - 6  # of each user; the rest judges
SHARP = UserPrior(torch.zeros(1).double(), torch.full((1, 1), 0.2).double())


def rows_of_rank(rank: int) -> RankRows:
    """People who say one thing for most of the time and have turned round at its end. The last rank's have no judges and no dates."""
    chance, total = np.random.default_rng(rank), USERS * DAYS
    day = np.tile(np.arange(DAYS), USERS)
    taste = np.repeat(chance.random(USERS) < 0.5, DAYS) ^ (day >= TRAINED_DAYS - 8)
    says = np.where(chance.random(total) < 0.9, taste, ~taste)
    judges, undated = rank < RANKS - 1, np.full(total, np.datetime64("NaT", "us"))
    table = PartitionTable(
        keys=np.sort(chance.integers(0, 256, (USERS, 16)).astype(np.uint8), axis=0),
        user_offsets=np.arange(0, total + 1, DAYS),
        tokens=np.full(total, 7, np.int32),
        row_offsets=np.arange(total + 1),
        labels=np.where(says, "x", "y").astype(object),
        split=((day >= TRAINED_DAYS) & judges).astype(np.int8),
        timestamps=np.datetime64("2024-01-01", "us") + day.astype("timedelta64[D]") if judges else undated,
    )
    return RankRows({0: table}, LabelSpace("classification", ("x", "y")), frozenset(), 0)


class OneNumber:
    """Passes of a model whose user vector is the logit of "x" over "y", whatever the text; ranks needn't be in step."""

    outputs = 2

    def linearise(self, rows: np.ndarray, point: torch.Tensor) -> tuple[Linearisation, torch.Tensor]:
        return Linearisation(torch.zeros(1), torch.zeros(1, 2), torch.ones(1, 1, 1)), torch.zeros(len(rows), dtype=torch.int64)

    def in_step(self, blocks: list[object]) -> list[object]:
        return blocks


def judging(index: int, folder: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/rendezvous", RANKS), rank=index, world_size=RANKS)
    rows = rows_of_rank(index)
    found = with_what_lasts(SHARP, OneNumber(), rows, "classification")  # type: ignore[arg-type]
    assert found.forgetting is not None
    told = [found.lasting, found.forgetting.half_life, found.forgetting.lasting, found.forgetting.newest]
    Path(folder, f"found-{index}").write_text(json.dumps(told))
    dist.barrier()
    os._exit(0)


def expected() -> tuple[float, float, float]:
    """lasting, half-life and its share, from all ranks' rows at once: the sums of single users' losses."""
    typical = TRAINED_DAYS - 1 - float(np.quantile(np.repeat(np.arange(TRAINED_DAYS), USERS), 0.5, method="nearest"))
    half_lives = [np.inf, *(typical / np.array(RATES)).tolist()]
    surprise = torch.tensor([0.0, *(FORGETS + rate for rate in RATES)])[:, None] + (1 - SHARES) ** 2 / (2 * SPREAD**2)
    age = torch.from_numpy(np.arange(TRAINED_DAYS)[::-1].astype(float))
    for rank in range(RANKS - 1):
        labels = rows_of_rank(rank).labels.view(USERS, DAYS)
        for own in labels:
            for place, half_life in enumerate(half_lives):
                linear = Linearisation(torch.zeros(1), torch.zeros(1, 2), torch.ones(1, 1, 1))
                learnt = torch.zeros(TRAINED_DAYS, dtype=torch.int64), own[:TRAINED_DAYS], torch.zeros(TRAINED_DAYS, dtype=torch.int64)
                mode = solve_users(linear, *learnt, 1, SHARP, "classification", weights=0.5 ** (age / half_life)).vectors.double()
                logit = SHARES * mode.item()
                for label in own[TRAINED_DAYS:].tolist():  # class 0 is "x"
                    surprise[place] += torch.nn.functional.softplus(logit if label else -logit)
    place, share = divmod(int(torch.argmin(surprise)), len(SHARES))
    return float(SHARES[int(torch.argmin(surprise[0]))]), float(half_lives[place]), float(SHARES[share])


def test_ranks_agree_on_what_lasts_and_how_fast_rows_are_forgotten_as_the_rows_of_all_of_them_say(tmp_path: Path) -> None:
    mp.spawn(judging, (str(tmp_path),), nprocs=RANKS)  # type: ignore[no-untyped-call]
    found = [json.loads((tmp_path / f"found-{index}").read_text()) for index in range(RANKS)]
    assert found[0] == found[1] == found[2]
    lasting, half_life, kept = expected()
    assert half_life < np.inf and lasting < kept, "they have turned round"
    assert found[0][:3] == pytest.approx([lasting, half_life, kept], abs=1e-9)
    assert found[0][3] == (np.datetime64("2024-01-01") - np.datetime64(0, "D")).astype(int) + DAYS - 1, "of the rows to fit"


def test_a_few_wrong_dates_change_nothing_of_the_newest_row_and_the_typical_age(alone: None) -> None:
    times = np.datetime64("2024-01-01", "us") + np.arange(1000).astype("timedelta64[h]")
    newest, typical_age = newest_and_typical_age(times)
    wrong = times.copy()
    wrong[::200] = np.array(["9999-12-31", "1970-01-01", "2124-01-01", "9999-12-31", "0001-01-01"], "datetime64[us]")
    assert newest_and_typical_age(wrong) == pytest.approx((newest, typical_age), abs=1)
    assert typical_age == pytest.approx(490 / 24, abs=0.1)


def test_rows_of_one_moment_and_rows_without_dates_have_no_age(alone: None) -> None:
    assert newest_and_typical_age(np.full(99_991, np.datetime64("2024-01-01T01:02:03.000457", "us")))[1] == 0.0
    assert newest_and_typical_age(np.full(9, np.datetime64("NaT", "us"))) == (0.0, 0.0)
    assert Forgetting(np.inf, 0.0).weights(np.array(["2024-01-01"], "datetime64[us]")).tolist() == [1.0]
