"""On a GPU: what the benchmarks of serving and training measure on a CPU, at the sizes of batches that a GPU is for.

    python -m benchmarks.gpu [--json] [--only forward ...]

Forward passes in bfloat16, as a replica with a GPU serves; training steps in float32. `large` is an encoder of BERT large's shape with
random weights: what a user's term costs doesn't hang on what the weights are.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Annotated, get_args

import torch
import typer
from transformers import BertConfig, BertModel

from benchmarks.figures import Figure
from benchmarks.made_generation import texts_of
from benchmarks.serve_forward import engine_vs_peft_adapter_names, engine_vs_plain_encoder
from benchmarks.step import one_rank, step_tokens_vs_peft_lora
from plora_ray.adapters.inject import Kind

BATCHES = (32, 256, 1024)
PEFT_TEXTS = 1024


def forward(rounds: int) -> Iterator[Figure]:
    """Different users in every row against no users at all."""
    for kind in get_args(Kind):
        for rows in BATCHES:
            yield engine_vs_plain_encoder(kind, rounds=rounds, rows=rows, device="cuda", dtype=torch.bfloat16)


def peft(rounds: int) -> Iterator[Figure]:
    """The engine, tokeniser included, against PEFT's mixed batches."""
    texts = texts_of(None, PEFT_TEXTS)
    for kind in get_args(Kind):
        yield engine_vs_peft_adapter_names(kind, texts, rounds=max(3, rounds // 10), device="cuda", dtype=torch.bfloat16)


def step(rounds: int) -> Iterator[Figure]:
    """A step of the population stage against PEFT's."""
    for rows in BATCHES[:2]:
        yield step_tokens_vs_peft_lora(rounds, rows)


def large(rounds: int) -> Iterator[Figure]:
    """Both, with 24 blocks of width 1024."""
    with tempfile.TemporaryDirectory(prefix="plora-gpu-") as folder:
        config = BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
        BertModel(config, add_pooling_layer=False).save_pretrained(folder)
        for kind in get_args(Kind):
            for rows in BATCHES[:2]:
                found = engine_vs_plain_encoder(kind, rounds=rounds, model=folder, rows=rows, device="cuda", dtype=torch.bfloat16)
                yield replace(found, figure=f"large_{found.figure}")
        found = step_tokens_vs_peft_lora(max(3, rounds // 3), BATCHES[0], folder)
        yield replace(found, figure=f"large_{found.figure}")


FIGURES: dict[str, Callable[[int], Iterator[Figure]]] = {"forward": forward, "peft": peft, "step": step, "large": large}


def main(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="forward, peft, step, large; all of them by default.")] = None,
    rounds: Annotated[int, typer.Option(help="Repetitions of each side.")] = 50,
) -> None:
    """Measure and print."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("torch sees no GPU here")
    if unknown := set(only or ()) - set(FIGURES):
        raise typer.BadParameter(f"there is no figure {sorted(unknown)[0]}: {', '.join(FIGURES)}")
    with one_rank():  # DeepSpeed knows one group in the life of a process
        for name in only or FIGURES:
            for figure in FIGURES[name](rounds):
                figure.emit(as_json)


if __name__ == "__main__":
    typer.run(main)
