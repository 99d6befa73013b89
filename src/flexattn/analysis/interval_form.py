"""The interval form of a mask: a graph that says of a block what the interval rules say of it.

In: a mask's graph, a bound of its indices, ranges of its run-time numbers, block sizes. Out: an
`IntervalForm`: q_idx and kv_idx are the first tokens of a block, and the output "mask" is EMPTY,
PARTIAL (undecided) or FULL. It is lowered like any graph, so one kernel decides all blocks. Reads
that depend on the block of queries, or on that of keys, come as tables (`line_tables`), with the
lowest and the highest value for each block, and whether there is NaN. A tensor that is read by both
together is known where the block reads one element of it.
Rejects (NoSymbolError): functions of floating point whose last bit is not the same on all devices,
since a block is what torch's own evaluation of the mask says it is.
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
from flexattn.analysis.interval_reads import Reads, Span, aligned_span, coarser
from flexattn.analysis.runs import EMPTY, FULL, PARTIAL
from flexattn.analysis.symbols import NoSymbolError, Symbol, lifted
from flexattn.analysis.undecided import Grid
from flexattn.ir.graph import Capture, Graph, Node, const, index_input, node
from flexattn.ir.mod import Mod
from flexattn.ir.ops import FLOATS, INDEX_INPUTS, LEAVES, Op
from flexattn.ir.simplify import simplify

Range = tuple[int, int]
_EXACT = frozenset({*LEAVES, Op.CAST, Op.FLOOR, Op.CEIL, Op.TRUNC, Op.ROUND, Op.NEG, Op.ABS,
                    Op.SIGN, Op.ADD, Op.SUB, Op.MUL, Op.MIN, Op.MAX, Op.WHERE})


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
    """graph: its captures are the mask's, then two for each of `reads` (three of floating point);
    its numbers are the mask's, then the last query and the last key."""

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
        self.captures = list(graph.captures)
        self.depends = _dependencies(graph)
        inexact = {n.op.name.lower() for n in self.order
                   if n.dtype in FLOATS and n.op not in _EXACT and not self.overall.constant(n)}
        if inexact:
            raise NoSymbolError(f"floating point that devices round differently ({min(inexact)})")

    def form(self) -> IntervalForm:
        spans = [self._span(name, size, slot) for slot, (name, size) in enumerate(
            zip(("q_idx", "kv_idx"), self.blocks, strict=True))]
        b, h = (Symbol(index_input(name)) for name in ("b", "h"))
        always, perhaps = self(Tiles(b, h, *spans))[:2]  # type: ignore[arg-type]
        kind = choose(always, FULL, choose(perhaps, PARTIAL, EMPTY))
        form = Graph((("mask", lifted(kind, torch.int64)),), tuple(self.captures),
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

    def _number(self, n: Node) -> Interval:
        return point(n.attr) if n.op is Op.CONST else point(Symbol(n))

    def _read(self, n: Node, args: list[Interval], tiles: Tiles) -> Interval:
        ranged = [d for d, x in enumerate(args) if not x.is_point]
        places = [lifted(x.lo, torch.int64) for x in args]
        if not ranged:
            return _one(node(Op.LOAD, *places, dtype=n.dtype, attr=n.attr))
        used = self.depends[n]
        if {"q_idx", "kv_idx"} <= used:
            return _if_one(node(Op.LOAD, *places, dtype=n.dtype, attr=n.attr), args)
        queries = "q_idx" in used
        span = tiles.q if queries else tiles.kv
        dim = ranged[0] if len(ranged) == 1 and tiles.span(n.args[ranged[0]]) else None
        images = tuple(name for name in ("b", "h") if name in used)
        self.line_reads[n] = LineRead(n, queries, dim, images)
        line = lifted(span.number, torch.int64)
        if dim is None:
            places = [*map(index_input, images), line]
        else:
            places = [p for d, p in enumerate(places) if d != dim] + [line]
        return Interval(*(self._table(places, dtype) for dtype in _table_dtypes(n.dtype)))

    def _table(self, places: list[Node], dtype: torch.dtype) -> Symbol:
        """A read of a table, which becomes a captured tensor."""
        self.captures.append(Capture(len(places), dtype))
        return _wide(node(Op.LOAD, *places, dtype=dtype, attr=len(self.captures) - 1))


def _table_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """Of the lowest, the highest, and whether there is NaN."""
    return (dtype, dtype, torch.bool) if dtype in FLOATS else (dtype, dtype)


def _one(load: Node) -> Interval:
    """A read at a point."""
    value = _wide(load)
    if load.dtype not in FLOATS:
        return point(value)
    nan = value != value
    return Interval(choose(nan, -torch.inf, value), choose(nan, torch.inf, value), nan)


def _if_one(load: Node, indices: list[Interval]) -> Interval:
    """A read at the lowest indices, where they are the highest as well; elsewhere anything."""
    one: Bound = True
    for x in indices:
        one = both(one, x.is_point or x.lo == x.hi)
    value, anything = _one(load), unbounded(load.dtype)
    if load.dtype is torch.bool:
        return Interval(both(one, value.lo), either(negate(one), value.hi))
    return Interval(choose(one, value.lo, anything.lo), choose(one, value.hi, anything.hi),
                    both(anything.nan, either(negate(one), value.nan)))


def _wide(load: Node) -> Symbol:
    value = Symbol(load)
    return value if load.dtype is torch.bool else (
        value.double() if load.dtype in FLOATS else value.long())


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


Tables = dict[LineRead, list[Tensor]]


def line_tables(form: IntervalForm, mod: Mod, grid: Grid, device: torch.device,
                finer: Tables | None = None, factor: int = 1) -> Tables:
    """The captured tensors of the form's reads, in their order, for the values that the mask
    captured. finer: those for blocks of as many queries and `factor` times fewer keys, which most
    tables are made from."""
    reads, tables = Reads(mod.captures), {}
    for read in form.reads:
        if finer and read in finer:
            tables[read] = finer[read] if read.queries else coarser(finer[read], factor)
            continue
        size, length = ((grid.q_block, grid.q_len) if read.queries
                        else (grid.kv_block, grid.kv_len))
        if read.dim is not None:
            found = list(reads.of_blocks(read.load.attr, read.dim, size, length, size))
        else:
            found = _over_blocks(read, mod, grid, device)
        tables[read] = [t.to(dtype) for t, dtype in zip(
            found, _table_dtypes(read.load.dtype), strict=False)]
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
    found = [torch.as_tensor(x, device=device).expand(shape) for x in value]
    for axis, name in ((1, "h"), (0, "b")):
        if name not in read.images:
            found = [t.select(axis, 0) for t in found]
    return [t.contiguous() for t in found]
