"""What several ranks take for forgettable: the same, by the rows of all of them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from plora_ray.training.judging import candidates_for
from tests.training.test_fitters import rows_of

ROWS = 78
DAYS = (np.arange(ROWS) % 40.0, np.arange(ROWS) % 11.0 + 100)  # of each rank's rows
UNDATED = np.arange(ROWS) % 5 == 0


def agreeing(index: int, folder: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/rendezvous", 3), rank=index, world_size=3)
    undated = np.full(ROWS, np.datetime64("NaT", "us"))
    days = DAYS[index].astype("timedelta64[D]") if index < 2 else None
    times = undated if days is None else np.where(UNDATED, undated, np.datetime64(0, "us") + days)
    found = [forgetting and (forgetting.half_life, forgetting.newest) for forgetting in candidates_for(rows_of(times=times))]
    Path(folder, f"found-{index}").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)


def test_ranks_agree_on_half_lives_in_the_mean_age_of_all_training_rows_and_on_the_newest_row(tmp_path: Path) -> None:
    mp.spawn(agreeing, (str(tmp_path),), nprocs=3)  # type: ignore[no-untyped-call]
    found = [json.loads((tmp_path / f"found-{index}").read_text()) for index in range(3)]
    train = ~UNDATED & (np.arange(ROWS) % 4 != 3)
    days = np.concatenate([own[train] for own in DAYS])
    mean_age = (days.max() - days).mean()
    assert found[0] == found[1] == found[2], "the third has no dated rows"
    assert found[0][0] is None and [newest for _, newest in found[0][1:]] == [days.max()] * 6
    assert [half_life for half_life, _ in found[0][1:]] == pytest.approx([mean_age / rate for rate in (0.25, 0.5, 1, 2, 4, 8)])
