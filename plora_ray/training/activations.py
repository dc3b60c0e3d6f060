"""Hidden states below the lowest adapter: the same for all users and epochs, so each different text is run through the lower blocks once.

They are kept in memory, then in a file, both bounded; what doesn't fit is computed again. First come, first kept: rows
come round in a new order every epoch, so replacing the oldest would replace what is needed soonest as often as not.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import IO

import numpy as np
import torch
from torch import Tensor

from plora_ray.adapters.halves import Halves
from plora_ray.training.engine import ShardedTrainer
from plora_ray.training.rank_rows import RankRows

# rows, input_ids, attention_mask -> a context under which the model's passes over this batch are made
Below = Callable[[np.ndarray, Tensor, Tensor], AbstractContextManager[None]]

logger = logging.getLogger(__name__)


def whole_passes(rows: np.ndarray, input_ids: Tensor, attention_mask: Tensor) -> AbstractContextManager[None]:
    """The `Below` that keeps nothing: every pass runs the whole model."""
    return nullcontext()


class LowerActivations:
    """Runs the lower half of a model for the texts of a batch that it doesn't know yet, and hands what it knows to the upper half.

    memory_bytes, disk_bytes: what this rank may keep. Where ranks meet in a pass, all of them must call `under` equally often.
    """

    def __init__(self, halves: Halves, trainer: ShardedTrainer, rows: RankRows, *, memory_bytes: int, disk_bytes: int) -> None:
        self._halves, self._trainer, self._rows = halves, trainer, rows
        self._kept = BoundedTensors(memory_bytes, disk_bytes)

    @contextmanager
    def under(self, rows: np.ndarray, input_ids: Tensor, attention_mask: Tensor) -> Iterator[None]:
        """Within, the PLM's passes over input_ids [batch, tokens] start above the lower blocks. rows: [batch], or none for an idle pass."""
        texts = self._rows.texts[rows].tolist()
        known = {text: hidden for text in set(texts) if (hidden := self._kept.get(text)) is not None}
        missing = {text: place for place, text in enumerate(texts) if text not in known}
        if self._trainer.anyone(bool(missing)):
            known |= self._run(missing, input_ids, attention_mask)
        with self._halves.above(self._padded(texts, known, input_ids)):
            yield

    def close(self) -> None:
        """Drop everything; the file is gone with it."""
        self._kept.close()

    def _run(self, missing: dict[int, int], input_ids: Tensor, attention_mask: Tensor) -> dict[int, Tensor]:
        """Hidden states [tokens, hidden] of the rows at the places that `missing` names; with none, one row keeps ranks in step."""
        places = torch.tensor(list(missing.values()) or [0], device=input_ids.device)
        mask = attention_mask[places]
        states = self._halves.lower(input_ids[places], mask).cpu()
        found = {text: states[row][real] for row, (text, real) in enumerate(zip(missing, mask.bool().cpu(), strict=False))}
        for text, hidden in found.items():
            self._kept.put(text, hidden)
        return found

    def _padded(self, texts: list[int], known: dict[int, Tensor], input_ids: Tensor) -> Tensor:
        """[batch, tokens, hidden] as the upper half takes it; padding is zero and masked."""
        hidden = torch.zeros(*input_ids.shape, self._halves.hidden_size, dtype=self._halves.dtype)
        for row, text in enumerate(texts):
            hidden[row, : len(known[text])] = known[text]
        return hidden.to(input_ids.device)


class BoundedTensors:
    """Tensors by name: the first ones in memory, further ones in a file without a name, the rest not at all.

    The file is unlinked as soon as it is made, so it is gone however the process ends; a full disk only ends its growth.
    """

    def __init__(self, memory_bytes: int, disk_bytes: int) -> None:
        self._memory_left, self._disk_left = memory_bytes, disk_bytes
        self._in_memory: dict[int, Tensor] = {}
        self._on_disk: dict[int, tuple[int, torch.Size, torch.dtype]] = {}
        self._file: IO[bytes] | None = None
        self.bytes_on_disk = 0

    def put(self, name: int, tensor: Tensor) -> None:
        """Keep a CPU tensor if there is room."""
        size = tensor.numel() * tensor.element_size()
        if size <= self._memory_left:
            self._memory_left -= size
            self._in_memory[name] = tensor.clone()
        elif size <= self._disk_left:
            self._write(name, tensor, size)

    def get(self, name: int) -> Tensor | None:
        """The tensor kept under that name, or None."""
        if name in self._in_memory:
            return self._in_memory[name]
        if name not in self._on_disk or self._file is None:
            return None
        offset, shape, dtype = self._on_disk[name]
        data = bytearray(os.pread(self._file.fileno(), shape.numel() * dtype.itemsize, offset))
        return torch.frombuffer(data, dtype=dtype).view(shape)

    def close(self) -> None:
        """Forget all and remove the file."""
        self._in_memory.clear()
        self._on_disk.clear()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, name: int, tensor: Tensor, size: int) -> None:
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="plora-activations-")  # noqa: SIM115
            data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
            if os.pwrite(self._file.fileno(), data, self.bytes_on_disk) < size:
                raise OSError("short write")
        except OSError as error:
            logger.warning("no more hidden states are kept on disk (%s); those that come are computed again", error)
            self._disk_left = 0
            return
        self._on_disk[name] = (self.bytes_on_disk, tensor.shape, tensor.dtype)
        self.bytes_on_disk += size
        self._disk_left -= size
