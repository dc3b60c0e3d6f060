"""The repeated blocks of a Hugging Face model: found without knowing the family, and recomputed in the backward pass.

Blocks are changed by putting another `forward` on the instance, so no module is renamed and no Hugging Face code edited.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from plora_ray.adapters.context import UserContext
from plora_ray.errors import ModelError


def find_blocks(plm: nn.Module) -> tuple[str, list[nn.Module]]:
    """Name and members of the largest list of modules of one class, by parameters: the blocks of a transformer, from the bottom up.

    Call it before an engine shards the model: sharded parameters look empty. Raises ModelError if the model has no such list.
    """
    lists = [(name, list(module)) for name, module in plm.named_modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
    lists = [(name, members) for name, members in lists if len({type(member) for member in members}) == 1]
    if not lists:
        raise ModelError(f"{type(plm).__name__} has no list of equal blocks: leave out adapter.top_layers and gradient_checkpointing")
    return max(lists, key=lambda found: sum(parameter.numel() for member in found[1] for parameter in member.parameters()))


def in_top_blocks(plm: nn.Module, names: Sequence[str], top: int) -> list[str]:
    """Those of `names` that lie in the `top` highest blocks. Raises ModelError if there are fewer blocks or no such name."""
    where, blocks = find_blocks(plm)
    if top > len(blocks):
        raise ModelError(f"adapter.top_layers is {top}, but {type(plm).__name__} has {len(blocks)} blocks: use at most {len(blocks)}")
    chosen = tuple(f"{where}.{place}." for place in range(len(blocks) - top, len(blocks)))
    kept = [name for name in names if name.startswith(chosen)]
    if not kept:
        raise ModelError(f"the top {top} blocks of {type(plm).__name__} have no adapter target: name others or raise adapter.top_layers")
    return kept


def checkpoint_blocks(plm: nn.Module, context: UserContext) -> None:
    """From now on keep only the blocks' inputs for the backward pass, which runs each block again (Chen et al., arXiv 1604.06174).

    Works in evaluation mode, with inputs that need no gradient, with `torch.autograd.grad`, and on sharded parameters. The second
    run sees the user context of the first.
    """
    for block in find_blocks(plm)[1]:
        block.forward = _recomputed(block.forward, context)


def _recomputed(forward: Callable[..., Any], context: UserContext) -> Callable[..., Any]:
    def block(*args: Any, **kwargs: Any) -> Any:
        output, again = forward(*args, **kwargs), cast(Callable[[Tensor], Tensor], _RunAgain.apply)
        return (again(output[0]), *output[1:]) if isinstance(output, tuple) else again(output)

    def run(*args: Any, **kwargs: Any) -> Any:
        # Without early stop the second run ends as the first did: a sharding engine's hooks release what they gathered. Released
        # parameters are empty, so shapes of saved tensors can't be compared between the runs.
        with set_checkpoint_early_stop(False):
            return checkpoint(
                block, *args, use_reentrant=False, determinism_check="none",
                context_fn=lambda: (nullcontext(), _as_it_was(context)), **kwargs,
            )  # fmt: skip

    return run


class _RunAgain(torch.autograd.Function):
    """Identity on a block's output. Its backward pass asks for a saved tensor, which begins the block's second run before any layer of
    the block computes gradients.

    A layer whose own gradient began it would find its sharded weight released by the time it goes on.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        ctx.save_for_backward(hidden)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        _ = ctx.saved_tensors
        return gradients[0]


def _as_it_was(context: UserContext) -> Any:
    """A context manager under which `context` reads as it does now; what a pass records under it is thrown away."""
    now = {**vars(context), "effects": {}}

    @contextmanager
    def restored() -> Iterator[None]:
        later = dict(vars(context))
        vars(context).update(now)
        try:
            yield
        finally:
            vars(context).update(later)

    return restored()
