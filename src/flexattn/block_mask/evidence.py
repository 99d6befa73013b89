"""Why blocks are what they are: how many were proved, how many evaluated, what defeated the proof.

In: a traced mask and its sizes. Out: an `Evidence`, which prints as text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flexattn.analysis.block_sparsity import SOLVERS, Sparsity, grid_of, mask_sparsity
from flexattn.analysis.interval import TileIntervals, Tiles
from flexattn.analysis.interval_reads import aligned_span
from flexattn.analysis.undecided import Grid
from flexattn.ir.graph import Node
from flexattn.ir.mod import Mod
from flexattn.ir.ops import LEAVES, Op

_SYMBOLS = {Op.ADD: "+", Op.SUB: "-", Op.MUL: "*", Op.DIV: "/", Op.FLOORDIV: "//", Op.MOD: "%",
            Op.AND: "&", Op.OR: "|", Op.XOR: "^", Op.SHL: "<<", Op.SHR: ">>", Op.LT: "<",
            Op.LE: "<=", Op.EQ: "==", Op.NE: "!=", Op.POW: "**"}
_DEEPEST = 6  # of a printed expression


@dataclass(frozen=True)
class Evidence:
    """Counts of blocks. `proved`: by their own intervals; `witnessed`: partial, seen at a few
    points; `split`: by intervals of parts of them; `evaluated`: by all of their elements.
    defeated: expressions that stayed undecided over evaluated blocks, and in what share of them.
    how: the way that the device has of making the mask, where it has its own."""

    empty: int
    partial: int
    full: int
    witnessed: int
    split: int
    evaluated: int
    defeated: tuple[tuple[str, float], ...] = ()
    how: str = ""

    @property
    def blocks(self) -> int:
        return self.empty + self.partial + self.full

    @property
    def proved(self) -> int:
        return self.blocks - self.witnessed - self.split - self.evaluated

    @property
    def evaluated_share(self) -> float:
        """Evaluated blocks, of those that are not empty."""
        return self.evaluated / max(self.partial + self.full, 1)

    def __str__(self) -> str:
        made = [f"made {self.how}"] if self.how else []
        parts = f", {self.split:,} by proofs over their parts" if self.split else ""
        lines = [f"{self.blocks:,} blocks: {self.empty:,} empty, {self.partial:,} partial, "
                 f"{self.full:,} full",
                 f"{self.proved:,} proved as they are, {self.witnessed:,} seen to be partial at a "
                 f"few points{parts}", *made]
        if not self.evaluated:
            return "\n".join([*lines, "no block had its elements evaluated"])
        lines.append(f"{self.evaluated:,} had all of their elements evaluated "
                     f"({self.evaluated_share:.1%} of those that are not empty); undecided there:")
        return "\n".join([*lines, *(f"  {share:4.0%}  {text}" for text, share in self.defeated)])


def evidence(mod: Mod, batch: int, heads: int, q_len: int, kv_len: int, q_block: int,
             kv_block: int, device: torch.device) -> Evidence:
    """The counts are of the dimensions that the mask reads: one for all heads where it reads no
    h."""
    grid = grid_of(mod, batch, heads, q_len, kv_len, q_block, kv_block)
    found = mask_sparsity(mod, grid, device)
    table = found.table
    lengths = table.end - table.start
    full = int(lengths[table.full].sum())
    partial = int(lengths.sum()) - full
    defeated = _defeated(mod, found, (q_len, kv_len)) if found.found.examples else ()
    return Evidence(found.tiles - partial - full, partial, full, found.found.witnessed,
                    found.found.split, found.found.evaluated, defeated,
                    _how(mod, grid, device))


def _how(mod: Mod, grid: Grid, device: torch.device) -> str:
    """How masks of this form are made on the device."""
    if device.type not in SOLVERS:
        return ""
    found = SOLVERS[device.type]().runs(mod, grid, device)
    return f"step by step: {found}" if isinstance(found, str) else "by one kernel for all blocks"


def _defeated(mod: Mod, sparsity: Sparsity, lengths: tuple[int, int]
              ) -> tuple[tuple[str, float], ...]:
    table = sparsity.table
    device = table.offsets.device
    image, row, column = torch.tensor(sparsity.found.examples, device=device).t()[:, :, None, None]
    sizes = {"b": table.batch, "h": table.heads, "q_idx": lengths[0], "kv_idx": lengths[1]}
    intervals = TileIntervals(mod.graph, mod.captures, mod.numbers, sizes)
    values = intervals.values(Tiles(image // table.heads, image % table.heads,
                                    aligned_span(row, table.row_block, lengths[0]),
                                    aligned_span(column, table.col_block, lengths[1])))
    open_ = {n: torch.as_tensor(x.hi, device=device) & ~torch.as_tensor(x.lo, device=device)
             for n, x in values.items() if n.dtype is torch.bool}
    counts: Counter[str] = Counter()
    shape = (len(image), 1, 1)
    for n in _innermost(mod.graph.output("mask"), open_):
        counts[expression(n)] += int(open_[n].expand(shape).sum())
    return tuple((text, count / len(image)) for text, count in counts.most_common(3) if count)


def _innermost(n: Node, open_: Mapping[Node, Tensor]) -> set[Node]:
    """Undecided nodes below n whose own arguments are no undecided truth values."""
    below = [a for a in n.args if a in open_ and bool(open_[a].any())]
    return set().union(*(_innermost(a, open_) for a in below)) if below else {n}


def expression(n: Node, depth: int = 0) -> str:
    """A node as Python would write it."""
    if n.op is Op.INPUT:
        return n.attr
    if n.op in (Op.CONST, Op.NUMBER):
        return str(n.attr) if n.op is Op.CONST else f"number{n.attr}"
    if depth > _DEEPEST:
        return "..."
    args = [expression(a, depth + 1) for a in n.args]
    if n.op is Op.LOAD:
        return f"captured{n.attr}[{', '.join(args)}]"
    if n.op in _SYMBOLS:
        plain = (a.op in LEAVES or a.op not in _SYMBOLS for a in n.args)
        left, right = (a if bare else f"({a})" for a, bare in zip(args, plain, strict=True))
        return f"{left} {_SYMBOLS[n.op]} {right}"
    name = str(n.dtype).removeprefix("torch.") if n.op is Op.CAST else n.op.name.lower()
    return f"{name}({', '.join(args)})"
