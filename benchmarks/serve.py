"""Serving speed: both sides of every figure in one run, alternating, so that only their ratio matters.

    python -m benchmarks.serve [--quick] [--json] [--data crehate_en.parquet] [--only engine_vs_plain_encoder ...]

Without --data texts are made up, with as many words as short posts have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.figures import Figure
from benchmarks.made_generation import texts_of
from benchmarks.serve_forward import engine_vs_peft_adapter_names, engine_vs_plain_encoder
from benchmarks.serve_http import http_vs_engine, http_vs_multiplexed_peft
from benchmarks.serve_users import adaptation, resident_users, working_set_four_times_the_cache, zipf_100k_vs_5

PEFT_ROWS = 256


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rounds, fewer users.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    data: Annotated[Path | None, typer.Option(help="Parquet file whose column `text` gives the texts.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="The figures to measure; all of them by default.")] = None,
) -> None:
    """Measure and print."""
    texts = texts_of(data, 2048)
    some, many = (3, 20) if quick else (10, 100)
    figures: dict[str, Callable[[], Iterable[Figure]]] = {
        "engine_vs_plain_encoder": lambda: [engine_vs_plain_encoder("plora", rounds=many)],
        "engine_vs_plain_encoder_lora_kind": lambda: [engine_vs_plain_encoder("lora", rounds=many)],
        "engine_vs_peft_adapter_names": lambda: [engine_vs_peft_adapter_names("plora", texts[:PEFT_ROWS], rounds=some)],
        "engine_vs_peft_adapter_names_lora_kind": lambda: [engine_vs_peft_adapter_names("lora", texts[:PEFT_ROWS], rounds=some)],
        "zipf_100k_vs_5": lambda: [zipf_100k_vs_5(texts, users=100_000, asked=200 if quick else 1000, rounds=some)],
        "working_set_4x_cache": lambda: working_set_four_times_the_cache(texts, users=400, asked=200 if quick else 1000, rounds=some),
        "resident_users": lambda: resident_users(100_000 if quick else 1_000_000),
        "adaptation": lambda: adaptation(texts, users=16 if quick else 64, rounds=some),
        "http_vs_engine": lambda: http_vs_engine(texts, users=1000, asked=200 if quick else 1000, rounds=some),
        "http_vs_multiplexed_peft": lambda: http_vs_multiplexed_peft(texts, users=1000, asked=64 if quick else 256, rounds=some),
    }
    for name in only or figures:
        if name not in figures:
            raise typer.BadParameter(f"there is no figure {name}: {', '.join(figures)}")
        for figure in figures[name]():
            figure.emit(as_json)


if __name__ == "__main__":
    typer.run(main)
