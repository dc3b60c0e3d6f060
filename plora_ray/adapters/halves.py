"""A frozen PLM in two halves: below the lowest adapter, where neither users nor training change anything, and above.

Both halves are the PLM's own forward pass, so masks, positions and norms are its own; the blocks of the other half only
pass hidden states on. Knows no cache and no engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from plora_ray.adapters.blocks import find_blocks
from plora_ray.errors import ModelError

PROBE_TOLERANCE = 1e-4  # relative; a wrong cut is off by its whole size


class Halves:
    """Cuts `plm` below its top `upper_blocks` blocks.

    hidden_size, dtype: of the hidden states between the halves. Raises ModelError if the PLM passes more between its blocks
    than hidden states that can be handed in again; it is tried out here.
    """

    def __init__(self, plm: nn.Module, upper_blocks: int) -> None:
        self._plm = plm
        self._blocks = find_blocks(plm)[1]
        self._cut = len(self._blocks) - upper_blocks  # 0: only the embeddings are below
        self._shapes: list[Any] = [None] * len(self._blocks)
        self.hidden_size, self.dtype = self._probe()

    @torch.no_grad()
    def lower(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Hidden states [batch, tokens, hidden] that enter the upper blocks; only the lower ones are run."""
        entered: list[Tensor] = []

        def passed_on(hidden: Tensor) -> Tensor:
            entered.append(hidden)
            return hidden

        with self._standing_in(range(self._cut, len(self._blocks)), passed_on):
            self._plm(input_ids=input_ids, attention_mask=attention_mask)
        return entered[0]

    def above(self, hidden: Tensor) -> Any:
        """A context under which the PLM's passes start from `hidden` [batch, tokens, hidden], the lower half's of the same batch."""
        return self._standing_in(range(self._cut), lambda _: hidden)

    @contextmanager
    def _standing_in(self, places: Sequence[int], hidden_of: Callable[[Tensor], Tensor]) -> Iterator[None]:
        kept = {place: vars(self._blocks[place]).get("forward") for place in places}
        for place in places:
            self._blocks[place].forward = _stand_in(self._blocks[place], self._shapes[place], hidden_of)
        try:
            yield
        finally:
            for place, forward in kept.items():
                if forward is None:
                    del self._blocks[place].forward
                else:
                    self._blocks[place].forward = forward

    @torch.no_grad()
    def _probe(self) -> tuple[int, torch.dtype]:
        """Learn what each block returns, and see that both halves together are the whole. Width and dtype of what passes between them."""
        device = next(self._plm.parameters()).device
        ids = torch.arange(3, 13, device=device).view(2, 5)
        mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], device=device)
        hooks = [
            block.register_forward_hook(lambda _block, _inputs, output, place=place: self._shapes.__setitem__(place, _shape_of(output)))
            for place, block in enumerate(self._blocks)
        ]
        whole = self._plm(input_ids=ids, attention_mask=mask).last_hidden_state
        for hook in hooks:
            hook.remove()
        try:
            hidden = self.lower(ids, mask)
            with self.above(hidden * mask.unsqueeze(-1)):  # kept hidden states have no padding
                again = self._plm(input_ids=ids, attention_mask=mask).last_hidden_state
            real = mask.bool()
            error = (again[real] - whole[real]).float().abs().max() / whole[real].float().abs().max()
            fits = bool(error < PROBE_TOLERANCE)
        except (ModelError, RuntimeError, TypeError, ValueError, IndexError, AttributeError):
            fits = False
        if not fits:
            raise ModelError(
                f"{type(self._plm).__name__} can't be cut below its top {len(self._blocks) - self._cut} blocks: "
                "set training.activation_cache_mb and training.activation_disk_mb to 0"
            )
        return hidden.shape[-1], hidden.dtype


def _shape_of(output: Any) -> Any:
    """None for a block that returns hidden states alone, else whether each further member of its tuple is a tensor."""
    return [isinstance(member, Tensor) for member in output[1:]] if isinstance(output, tuple) else None


def _stand_in(block: nn.Module, shape: list[bool] | None, hidden_of: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """A forward with the block's signature and outputs, whose hidden states are `hidden_of` those that enter."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        entering = args[0] if args else kwargs["hidden_states"]
        hidden = hidden_of(entering)
        if shape is None:
            return hidden
        return (hidden, *(_position_bias(block, hidden, args, kwargs) if is_tensor else None for is_tensor in shape))

    return forward


def _position_bias(block: nn.Module, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The one further tensor that stand-ins know: T5's relative position bias, made by the first block and handed from block to block."""
    given = kwargs.get("position_bias", args[2] if len(args) > 2 else None)
    if given is not None:
        return given
    maker = next((module for module in block.modules() if getattr(module, "has_relative_attention_bias", False)), None)
    if maker is None:
        raise ModelError(f"{type(block).__name__} returns tensors that can't be made without running it")
    compute_bias: Any = maker.compute_bias
    bias: Tensor = compute_bias(hidden.shape[1], hidden.shape[1], device=hidden.device)
    return bias
