"""Which users go through the model together: blocks of equally many rows a user, bounded in padded tokens.

A user's matrices are gathered once a block, so all users of a pass need equally many rows. A user's rows are cut into blocks of
like lengths, so that short rows aren't padded to its longest; blocks of like row counts and lengths come together, whoever's they
are. What a block lacks is filled with its own first row at weight zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CUT_ROWS = 2  # rows of a block that is cut by length: fewer waste less padding, more share a gather
FULL_ENOUGH = 0.75  # a user joins a block that its rows fill to this share; below it, filling up costs more than a pass of its own


@dataclass(frozen=True)
class Share:
    """Rows of one user for one pass. places: [k], at least one; longest: tokens of the longest; of: rows that a mean is taken over."""

    user: int
    places: Tensor
    longest: int
    of: int


@dataclass(frozen=True)
class Pack:
    """One pass. users: [blocks], the same one again where several of its blocks are in it. places: [blocks, k].

    mean_weights: [blocks, k], 1 / rows that the user's mean is taken over, 0 where the block is filled up.
    """

    users: Tensor
    places: Tensor
    mean_weights: Tensor


def cut_by_length(user: int, places: Tensor, lengths: Tensor) -> list[Share]:
    """A user's rows `places` [k] of so many tokens `lengths` [k], cut into blocks of at most CUT_ROWS rows of like lengths."""
    order = torch.argsort(lengths, descending=True, stable=True)
    return [Share(user, places[part], int(lengths[part[0]]), len(places)) for part in torch.split(order, CUT_ROWS)]


def pack_shares(shares: list[Share], max_tokens: int, max_rows: int) -> list[Pack]:
    """Passes over all shares, each at most `max_rows` rows and `max_tokens` tokens padded to its longest row.

    A share that is over the bounds on its own gets a pass on its own.
    """
    packs: list[Pack] = []
    block: list[Share] = []
    longest = 0
    for share in sorted(shares, key=lambda share: (-len(share.places), -share.longest, share.user)):
        rows = len(block[0].places) if block else len(share.places)
        grown = (len(block) + 1) * rows
        if block and (grown > max_rows or grown * max(longest, share.longest) > max_tokens or len(share.places) < FULL_ENOUGH * rows):
            packs.append(_pack(block))
            block, longest = [], 0
        block.append(share)
        longest = max(longest, share.longest)
    return [*packs, _pack(block)] if block else packs


def _pack(block: list[Share]) -> Pack:
    rows = len(block[0].places)
    places = torch.stack([torch.cat([share.places, share.places[:1].expand(rows - len(share.places))]) for share in block])
    counts = torch.tensor([len(share.places) for share in block]).unsqueeze(1)
    weights = (torch.arange(rows) < counts) / torch.tensor([share.of for share in block]).unsqueeze(1)
    return Pack(torch.tensor([share.user for share in block]), places, weights)
