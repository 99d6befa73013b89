"""Blocks that no interval decides: witnesses first, then proofs over parts, then every element.

In: image, row and column of blocks. Out: their exact kinds. A block that holds a true and a false
element is PARTIAL: corners and a few other points show most of them. Where they do not, the block
is split again and again, the few undecided parts followed; a block with too many of them has all
its elements evaluated, in chunks of bounded memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from flexattn.analysis.interval import TileIntervals, Tiles
from flexattn.analysis.interval_reads import Span
from flexattn.analysis.runs import EMPTY, FULL, PARTIAL
from flexattn.ir.evaluate import evaluate
from flexattn.ir.mod import Mod

_TRUE, _FALSE, _BOTH = 1, 2, 3  # elements seen
_SPLIT = 4  # parts along each axis
_FOLLOWED = (8, 128)  # undecided parts of one block, at first and where those were too few
_EXAMPLES = 64
_POINTS = ((0.0, 1.0), (0.07, 0.37, 0.58, 0.89))  # of a block's sides
_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 24}  # evaluated at once


@dataclass(frozen=True)
class Grid:
    """Sizes of a mask in tokens and blocks; batch and heads are 1 where the mod does not read
    them. An image is a batch entry and head: b * heads + h."""

    batch: int
    heads: int
    q_len: int
    kv_len: int
    q_block: int
    kv_block: int

    @property
    def rows(self) -> int:
        return -(-self.q_len // self.q_block)

    @property
    def columns(self) -> int:
        return -(-self.kv_len // self.kv_block)

    @property
    def images(self) -> int:
        return self.batch * self.heads

    def entry(self, image: Tensor) -> tuple[Tensor | int, Tensor | int]:
        """b and h of images; an int where there is one."""
        if self.images == 1:
            return 0, 0
        if self.heads == 1:
            return image, 0
        return (0 if self.batch == 1 else image // self.heads), image % self.heads


@dataclass
class Found:
    """How many blocks were decided how; `examples`: (image, row, column) of evaluated ones."""

    witnessed: int = 0
    split: int = 0
    evaluated: int = 0
    examples: list[tuple[int, int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Blocks:
    """Blocks by entry and by their first and last token, int64 [n] each."""

    image: Tensor
    q_lo: Tensor
    q_hi: Tensor
    kv_lo: Tensor
    kv_hi: Tensor

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, chosen: Tensor | slice) -> Blocks:
        return Blocks(*(getattr(self, name)[chosen]
                        for name in ("image", "q_lo", "q_hi", "kv_lo", "kv_hi")))


class Undecided:
    """Decides blocks of one mask."""

    def __init__(self, mod: Mod, intervals: TileIntervals, grid: Grid, device: torch.device
                 ) -> None:
        self.mod, self.intervals, self.grid, self.device = mod, intervals, grid, device
        self.elements = _ELEMENTS["cpu" if device.type == "cpu" else "cuda"]
        self.found = Found()

    def kinds(self, image: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """uint8 [n]: EMPTY, PARTIAL or FULL."""
        grid = self.grid
        q_lo, kv_lo = row * grid.q_block, column * grid.kv_block
        blocks = Blocks(image, q_lo, (q_lo + (grid.q_block - 1)).clamp(max=grid.q_len - 1), kv_lo,
                        (kv_lo + (grid.kv_block - 1)).clamp(max=grid.kv_len - 1))
        seen = torch.zeros(len(blocks), dtype=torch.uint8, device=self.device)
        left = torch.arange(len(blocks), device=self.device)
        for points in _POINTS:
            if len(left):
                here = self._at_points(blocks[left], points)
                seen[left] |= here
                left = left[seen[left] != _BOTH]
        self.found.witnessed += len(blocks) - len(left)
        kinds = torch.full_like(seen, PARTIAL)
        if len(left):
            kinds[left] = self._by_parts(blocks[left], seen[left])
        return kinds

    def _at_points(self, blocks: Blocks, shares: tuple[float, ...]) -> Tensor:
        """What is seen at a grid of points of each block."""
        step = max(self.elements // len(shares)**2, 1)
        share = torch.tensor(shares, dtype=torch.float64, device=self.device)
        seen = []
        for first in range(0, len(blocks), step):
            some = blocks[first : first + step]
            q = some.q_lo[:, None] + ((some.q_hi - some.q_lo)[:, None] * share).long()
            kv = some.kv_lo[:, None] + ((some.kv_hi - some.kv_lo)[:, None] * share).long()
            seen.append(self._seen(some.image, q, kv))
        return torch.cat(seen)

    def _seen(self, image: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        """What elements q x kv of each block are: q [n, i], kv [n, j]."""
        entry = self.grid.entry(image[:, None, None])
        b, h = (torch.as_tensor(e, device=self.device) for e in entry)
        inputs = {"b": b, "h": h, "q_idx": q[:, :, None], "kv_idx": kv[:, None]}
        attended = evaluate(self.mod.graph, inputs, self.mod.captures, self.mod.numbers)["mask"]
        attended = attended.expand(len(q), q.shape[1], kv.shape[1])
        return _bits(attended.any(2).any(1), ~attended.all(2).all(1))

    def _by_parts(self, blocks: Blocks, seen: Tensor) -> Tensor:
        left = torch.arange(len(blocks), device=self.device)
        for most in _FOLLOWED:
            if most * _SPLIT**3 > self.grid.q_block * self.grid.kv_block:
                break  # no cheaper than all elements
            step = max(self.elements // (_SPLIT**2 * most), 1)
            lost = torch.cat([self._followed(blocks, seen, some, most)
                              for some in left.split(step)]) if len(left) else left
            left = lost
        self.found.split += len(blocks) - len(left)
        if len(left):
            self._note(blocks[left])
            seen[left] = self._evaluated(blocks[left])
        return torch.where(seen == _BOTH, PARTIAL, torch.where(seen == _TRUE, FULL, EMPTY)).to(
            torch.uint8)

    def _followed(self, blocks: Blocks, seen: Tensor, some: Tensor, most: int) -> Tensor:
        """Proofs over ever smaller parts of some blocks, at most `most` undecided ones of each;
        gives the blocks that stay undecided."""
        lost = torch.zeros(len(blocks), dtype=torch.bool, device=self.device)
        parts, owner, sizes = blocks[some], some, (self.grid.q_block, self.grid.kv_block)
        while len(parts) and sizes != (1, 1):
            sizes = (-(-sizes[0] // _SPLIT), -(-sizes[1] // _SPLIT))
            parts, owner = self._split(parts, owner, sizes, seen)
            keep = seen[owner] != _BOTH
            parts, owner = parts[keep], owner[keep]
            counts = torch.bincount(owner, minlength=len(blocks))
            before = counts.cumsum(0) - counts
            keep = torch.arange(len(owner), device=self.device) - before[owner] < most
            lost[owner[~keep]] = True
            parts, owner = parts[keep], owner[keep]
        lost[owner] = True
        return some[(lost & (seen != _BOTH))[some]]

    def _split(self, blocks: Blocks, owner: Tensor, sizes: tuple[int, int], seen: Tensor
               ) -> tuple[Blocks, Tensor]:
        """The undecided parts of blocks, and whose they are; adds what is proved to `seen`."""
        offsets = torch.arange(_SPLIT, device=self.device)
        q, q_valid = _parts(blocks.q_lo, blocks.q_hi, offsets[:, None] * sizes[0], sizes[0])
        kv, kv_valid = _parts(blocks.kv_lo, blocks.kv_hi, offsets * sizes[1], sizes[1])
        tiles = Tiles(*self.grid.entry(blocks.image[:, None, None]), q, kv)
        shape = (len(blocks), _SPLIT, _SPLIT)
        always, perhaps = (torch.as_tensor(x, device=self.device).expand(shape)
                           for x in self.intervals(tiles)[:2])
        valid = (q_valid & kv_valid).expand(shape)
        bits = _bits((always & valid).any(2).any(1), (~perhaps & valid).any(2).any(1))
        for bit in (_TRUE, _FALSE):
            seen[owner[(bits & bit) != 0]] |= bit
        part, i, j = (perhaps & ~always & valid).nonzero().unbind(1)
        chosen = Blocks(blocks.image[part], q.lo[part, i, 0], q.hi[part, i, 0],
                        kv.lo[part, 0, j], kv.hi[part, 0, j])
        return chosen, owner[part]

    def _evaluated(self, blocks: Blocks) -> Tensor:
        """What all elements of each block are."""
        q_block, kv_block = self.grid.q_block, self.grid.kv_block
        step = max(self.elements // (q_block * kv_block), 1)
        q, kv = (torch.arange(n, device=self.device) for n in (q_block, kv_block))
        seen = []
        for first in range(0, len(blocks), step):
            some = blocks[first : first + step]
            seen.append(self._seen(
                some.image, torch.minimum(some.q_lo[:, None] + q, some.q_hi[:, None]),
                torch.minimum(some.kv_lo[:, None] + kv, some.kv_hi[:, None])))
        return torch.cat(seen)

    def _note(self, blocks: Blocks) -> None:
        self.found.evaluated += len(blocks)
        wanted = _EXAMPLES - len(self.found.examples)
        if wanted > 0:
            some = blocks[:wanted]
            rows, columns = some.q_lo // self.grid.q_block, some.kv_lo // self.grid.kv_block
            self.found.examples += zip(some.image.tolist(), rows.tolist(), columns.tolist(),
                                       strict=True)


def _bits(true: Tensor, false: Tensor) -> Tensor:
    return true.to(torch.uint8) | (false.to(torch.uint8) << 1)


def _parts(lo: Tensor, hi: Tensor, offset: Tensor, size: int) -> tuple[Span, Tensor]:
    """Parts of ranges, [n, ...] with the shape of `offset`, and which of them are not empty."""
    ranked = (slice(None), None, None)
    first, last = lo[ranked] + offset, hi[ranked]
    end = torch.minimum(first + (size - 1), last)
    return Span(torch.minimum(first, end), end, size), first <= last
