"""Batches: bounded, of like lengths, none waits for long."""

from __future__ import annotations

import threading

import pytest
import torch

from plora_ray.inference.batcher import Batcher, EngineClosed, QueueFull


def batcher_of(sizes: list[tuple[int, int]], gate: threading.Event, **changes: float) -> Batcher:
    """A batcher whose forward pass records (rows, longest) and returns each row's length."""

    def forward(ids: object, vectors: object) -> torch.Tensor:
        gate.wait(5)
        lengths = [len(row) for row in ids]  # type: ignore[attr-defined]
        sizes.append((len(lengths), max(lengths)))
        return torch.tensor([[float(length)] for length in lengths])

    return Batcher(forward, **{"max_tokens": 40, "max_rows": 8, "wait_s": 0.0, "max_queued": 100, **changes})  # type: ignore[arg-type]


def test_batches_are_bounded_in_padded_tokens_and_every_row_gets_its_own_result() -> None:
    sizes: list[tuple[int, int]] = []
    gate = threading.Event()
    batcher = batcher_of(sizes, gate)
    lengths = [3, 9, 1, 20, 5, 5, 5, 40, 2, 60, 1]
    futures = batcher.submit([([1] * length, None) for length in lengths])
    gate.set()
    assert [future.result(5).item() for future in futures] == lengths
    assert all(rows * longest <= 40 or rows == 1 for rows, longest in sizes) and all(rows <= 8 for rows, _ in sizes)
    batcher.close()
    with pytest.raises(EngineClosed):
        batcher.submit([([1], None)])


def test_rows_of_like_lengths_share_a_batch_and_the_oldest_row_is_in_the_first() -> None:
    sizes: list[tuple[int, int]] = []
    gate = threading.Event()
    batcher = batcher_of(sizes, gate, max_tokens=1000, pass_tokens=20)
    blocker = batcher.submit([([1], None)])
    while batcher._rows:  # it holds the model while the others queue up
        pass
    lengths = [50, 3, 3, 48, 4, 50, 3, 49]
    futures = batcher.submit([([1] * length, None) for length in lengths])
    gate.set()
    assert [future.result(5).item() for future in blocker + futures] == [1, *lengths]
    batcher.close()
    assert sizes == [(1, 1), (4, 50), (4, 4)]


def test_a_long_row_among_a_stream_of_short_ones_waits_for_no_more_than_one_batch() -> None:
    sizes: list[tuple[int, int]] = []
    gate = threading.Event()
    batcher = batcher_of(sizes, gate, max_tokens=1000, max_rows=4, max_queued=1000)
    blocker = batcher.submit([([1], None)])
    while batcher._rows:
        pass
    batcher.submit([([1] * 2, None)] * 3)
    long = batcher.submit([([1] * 90, None)])
    rest = batcher.submit([([1] * 2, None)] * 40)
    gate.set()
    for future in blocker + long + rest:
        future.result(5)
    batcher.close()
    assert sizes.index((1, 90)) == 2, "after the blocker and the batch of the rows before it"


def test_padding_that_costs_less_than_one_more_pass_is_taken() -> None:
    sizes: list[tuple[int, int]] = []
    gate = threading.Event()
    batcher = batcher_of(sizes, gate, max_tokens=1000, pass_tokens=40)
    blocker = batcher.submit([([1], None)])
    while batcher._rows:
        pass
    futures = batcher.submit([([1] * length, None) for length in (10, 2, 2, 2)])
    gate.set()
    for future in blocker + futures:
        future.result(5)
    batcher.close()
    assert sizes == [(1, 1), (4, 10)]


def test_a_full_queue_refuses_all_rows_of_a_request_and_cancelled_rows_are_skipped() -> None:
    sizes: list[tuple[int, int]] = []
    gate = threading.Event()
    batcher = batcher_of(sizes, gate, max_queued=3)
    batcher.submit([([1], None)])
    while batcher._rows:  # the first row is being computed and holds the model
        pass
    waiting = batcher.submit([([1, 1], None)] * 3)
    with pytest.raises(QueueFull):
        batcher.submit([([1], None)])
    for future in waiting:
        future.cancel()
    gate.set()
    batcher.close()
    assert sizes == [(1, 1)]


def test_a_failing_pass_fails_its_callers_only() -> None:
    calls = iter([RuntimeError("once"), torch.tensor([[7.0]])])

    def forward(ids: object, vectors: object) -> torch.Tensor:
        result = next(calls)
        if isinstance(result, Exception):
            raise result
        return result

    batcher = Batcher(forward, max_tokens=10, max_rows=1, wait_s=0.0, max_queued=10)
    with pytest.raises(RuntimeError, match="once"):
        batcher.submit([([1], None)])[0].result(5)
    assert batcher.submit([([1], None)])[0].result(5).item() == 7.0
    batcher.close()
