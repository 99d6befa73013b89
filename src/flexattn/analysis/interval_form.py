"""The interval form of a mask: a graph that says of a block what the interval rules say of it.

In: a mask's graph, a bound of its indices, ranges of its run-time numbers, block sizes. Out: an
`IntervalForm`: q_idx and kv_idx are the first tokens of a block, and the output "mask" is EMPTY,
PARTIAL (undecided) or FULL. It is lowered like any graph, so one kernel decides all blocks. Reads
that depend on the block of queries, or on that of keys, come as tables (`line_tables`), with the
lowest and the highest value for each block. A tensor that is read by both together is known where
the block reads one element of it.
Rejects (NoSymbolError): floating point that varies over blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexattn.analysis.bounds import (
    Bound,
    Interval,
    both,
    choose,
    either,
    minimum,
    negate,
    point,
    unbounded,
)
from flexattn.analysis.interval import TileIntervals, Tiles, overall_ranges
from flexattn.analysis.interval_reads import Reads, Span, aligned_span
from flexattn.analysis.runs import EMPTY, FULL, PARTIAL
from flexattn.analysis.symbols import NoSymbolError, Symbol, lifted
from flexattn.analysis.undecided import Grid
from flexattn.ir.graph import Capture, Graph, Node, const, index_input, node
from flexattn.ir.mod import Mod
from flexattn.ir.ops import FLOATS, INDEX_INPUTS, Op
from flexattn.ir.simplify import simplify

Range = tuple[int, int]


@dataclass(frozen=True)
class LineRead:
    """A read that depends on the block of queries alone (or of keys), and on b and h. dim: the
    dimension that is read at the block's positions themselves, where the others are points."""

    load: Node
    queries: bool
    dim: int | None
    images: tuple[str, ...]


@dataclass(frozen=True)
class IntervalForm:
    """graph: its captures are the mask's, then two for each of `reads`; its numbers are the mask's,
    then the last query and the last key."""

    graph: Graph
    reads: tuple[LineRead, ...]


def interval_form(graph: Graph, index_bound: int, numbers: Sequence[Range | None], q_block: int,
                  kv_block: int) -> IntervalForm:
    """For 0 <= b, h, q_idx, kv_idx < index_bound."""
    return _Writer(graph, index_bound, numbers, (q_block, kv_block)).form()


class _Writer(TileIntervals):
    """The intervals of one tile whose place is known when kernels run."""

    def __init__(self, graph: Graph, index_bound: int, numbers: Sequence[Range | None],
                 blocks: tuple[int, int]) -> None:
        self.bounds = dict.fromkeys(INDEX_INPUTS, (0, index_bound - 1))
        self.numbers = [Interval(*r) if r else unbounded(dtype)
                        for r, dtype in zip(numbers, graph.numbers, strict=True)]
        self._analyse(graph, overall_ranges(graph, self.bounds, None, self.numbers))
        self.blocks = blocks
        self.line_reads: dict[Node, LineRead] = {}
        self.depends = _dependencies(graph)
        if any(n.dtype in FLOATS and not self.overall.constant(n) for n in self.order):
            raise NoSymbolError("floating point that varies over blocks")

    def form(self) -> IntervalForm:
        spans = [self._span(name, size, slot) for slot, (name, size) in enumerate(
            zip(("q_idx", "kv_idx"), self.blocks, strict=True))]
        b, h = (Symbol(index_input(name)) for name in ("b", "h"))
        always, perhaps = self(Tiles(b, h, *spans))[:2]  # type: ignore[arg-type]
        kind = choose(always, FULL, choose(perhaps, PARTIAL, EMPTY))
        captures = list(self.graph.captures)
        for read in self.line_reads.values():
            captures += [Capture(self._rank(read), read.load.dtype)] * 2
        form = Graph((("mask", lifted(kind, torch.int64)),), tuple(captures),
                     (*self.graph.numbers, torch.int64, torch.int64))
        return IntervalForm(self._folded(form), tuple(self.line_reads.values()))

    def _folded(self, form: Graph) -> Graph:
        """The form, without what is the same wherever the block lies."""
        last = [Interval(*self.bounds["q_idx"])] * 2
        overall = overall_ranges(form, self.bounds, None, [*self.numbers, *last])
        done: dict[Node, Node] = {}
        for n in form.nodes:
            known = overall.constant(n)
            done[n] = const(known.lo, n.dtype) if known else node(
                n.op, *(done[a] for a in n.args), dtype=n.dtype, attr=n.attr)
        return _with_shape(simplify(form.replace_outputs(("mask", done[form.output("mask")]))))

    def _span(self, name: str, size: int, slot: int) -> Span:
        lo = Symbol(index_input(name))
        last = Symbol(node(Op.NUMBER, dtype=torch.int64, attr=len(self.graph.numbers) + slot))
        hi = minimum(lo + (size - 1), last)
        return Span(lo, hi, size, lo // size)  # type: ignore[arg-type]

    def _rank(self, read: LineRead) -> int:
        return len(read.images) + 1 if read.dim is None else len(read.load.args)

    def _number(self, n: Node) -> Interval:
        return point(n.attr) if n.op is Op.CONST else point(Symbol(n))

    def _read(self, n: Node, args: list[Interval], tiles: Tiles) -> Interval:
        ranged = [d for d, x in enumerate(args) if not x.is_point]
        places = [lifted(x.lo, torch.int64) for x in args]
        if not ranged:
            return point(_whole_number(node(Op.LOAD, *places, dtype=n.dtype, attr=n.attr)))
        used = self.depends[n]
        if {"q_idx", "kv_idx"} <= used:
            return _if_one(node(Op.LOAD, *places, dtype=n.dtype, attr=n.attr), args)
        queries = "q_idx" in used
        span = tiles.q if queries else tiles.kv
        dim = ranged[0] if len(ranged) == 1 and tiles.span(n.args[ranged[0]]) else None
        images = tuple(name for name in ("b", "h") if name in used)
        self.line_reads.setdefault(n, LineRead(n, queries, dim, images))
        line = lifted(span.number, torch.int64)
        if dim is None:
            places = [*map(index_input, images), line]
        else:
            places = [p for d, p in enumerate(places) if d != dim] + [line]
        slot = len(self.graph.captures) + 2 * list(self.line_reads).index(n)
        return Interval(*(_whole_number(node(Op.LOAD, *places, dtype=n.dtype, attr=slot + i))
                          for i in range(2)))


def _if_one(load: Node, indices: list[Interval]) -> Interval:
    """A read at the lowest indices, where they are the highest as well; elsewhere anything."""
    one: Bound = True
    for x in indices:
        one = both(one, x.is_point or x.lo == x.hi)
    value, anything = _whole_number(load), unbounded(load.dtype)
    if load.dtype is torch.bool:
        return Interval(both(one, value), either(negate(one), value))
    return Interval(choose(one, value, anything.lo), choose(one, value, anything.hi))


def _whole_number(load: Node) -> Symbol:
    value = Symbol(load)
    return value if load.dtype is torch.bool else value.long()


def _with_shape(form: Graph) -> Graph:
    """A form that is more than a constant, which a lowering takes for a truth value."""
    kind = form.output("mask")
    if not kind.is_const:
        return form
    outside = Symbol(index_input("q_idx")) < 0
    return form.replace_outputs(("mask", lifted(choose(outside, EMPTY, kind.attr), torch.int64)))


def _dependencies(graph: Graph) -> dict[Node, frozenset[str]]:
    found: dict[Node, frozenset[str]] = {}
    for n in graph.nodes:
        own = {n.attr} if n.op is Op.INPUT else set()
        found[n] = frozenset(own.union(*(found[a] for a in n.args)))
    return found


def line_tables(form: IntervalForm, mod: Mod, grid: Grid, device: torch.device) -> list[Tensor]:
    """The captured tensors of the form's reads, for the values that the mask captured."""
    reads, tables = Reads(mod.captures), []
    for read in form.reads:
        size, length = ((grid.q_block, grid.q_len) if read.queries
                        else (grid.kv_block, grid.kv_len))
        if read.dim is not None:
            found = list(reads.of_blocks(read.load.attr, read.dim, size, length, size)[:2])
        else:
            found = _over_blocks(read, mod, grid, device)
        tables += [t.to(read.load.dtype) for t in found]
    return tables


def _over_blocks(read: LineRead, mod: Mod, grid: Grid, device: torch.device) -> list[Tensor]:
    """[B, H, blocks], without the dimensions that the read does not depend on."""
    lengths = {"b": grid.batch, "h": grid.heads, "q_idx": grid.q_len, "kv_idx": grid.kv_len}
    intervals = TileIntervals(mod.graph.replace_outputs(("mask", read.load)), mod.captures,
                              mod.numbers, lengths, (grid.q_block, grid.kv_block))
    b, h = (torch.arange(n, device=device) for n in (grid.batch, grid.heads))
    lines, size, length = ((grid.rows, grid.q_block, grid.q_len) if read.queries
                           else (grid.columns, grid.kv_block, grid.kv_len))
    span = aligned_span(torch.arange(lines, device=device), size, length)
    value = intervals(Tiles(b[:, None, None], h[:, None], span, span))
    shape = (grid.batch, grid.heads, lines)
    found = [torch.as_tensor(x, device=device).expand(shape) for x in value[:2]]
    for axis, name in ((1, "h"), (0, "b")):
        if name not in read.images:
            found = [t.select(axis, 0) for t in found]
    return [t.contiguous() for t in found]
