"""Writes nodes as lines of Triton source: the writer behind lower/triton.py.

A `Role` is one mod (with its gradient) rewritten for tiles; a `Writer` puts the nodes of one role
into one function. Reads are clamped unless proven in range; a read that may leave its tensor also
gives a value that says where it did.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from flexattn.ir.graph import Graph, Node
from flexattn.ir.ops import LEAVES, Op
from flexattn.lower.scales import Scales, take_out
from flexattn.lower.separate import COLUMNS, HEAD, ROWS, TILE, Separation, levels
from flexattn.lower.triton_facts import CaptureFact, ModFacts, ReadFact, leaf_ranges
from flexattn.lower.triton_ops import HALVES, TABLE, TYPE_NAMES, Context, literal

HOISTED = {HEAD: "head", ROWS: "rows", COLUMNS: "columns"}
_INLINE = 48  # longest expression written into another one
_READ_TWICE = frozenset({Op.TRUNC, Op.SIGN, Op.POW})  # operands must be names
_EXACT = frozenset({Op.LOAD, Op.WHERE, Op.NEG, Op.ABS, Op.MIN, Op.MAX})  # never round


@dataclass
class _Read:
    """A LOAD after rewriting: the argument it reads and what is proven of its index."""

    argument: str
    number: int  # in the role, for reports
    capture: CaptureFact
    dims: tuple[ReadFact, ...]


class Role:
    """A mod and what is known of it, rewritten so that rows and columns are computed apart.

    graphs: pairs of graph and facts; all of one mod, so captures and numbers are shared.
    """

    def __init__(self, prefix: str, context: Context, index_bound: int,
                 graphs: Sequence[tuple[Graph, ModFacts]], report: bool) -> None:
        first = graphs[0][1]
        outputs = tuple(item for graph, _ in graphs for item in graph.outputs)
        whole = Graph(outputs, graphs[0][0].captures, graphs[0][0].numbers)
        ranges = leaf_ranges(whole, index_bound, first.numbers)
        new = Separation(ranges, levels(whole.nodes))(whole.nodes)
        self.graph, self.scales = whole.replace_outputs(
            *((name, new[n]) for name, n in outputs)), Scales()
        if context.fast and prefix == "score":
            equal, self.graph, self.scales = take_out(self.graph)
            new = {n: equal.get(m, m) for n, m in new.items()}
        self.prefix = prefix
        self.level = levels(self.graph.nodes)
        exact = prefix == "mask"
        self.context = Context(context.target, context.fast and not exact,
                               leaf_ranges(self.graph, index_bound, first.numbers), exact)
        self.reads: dict[Node, _Read] = {}
        for graph, facts in graphs:
            self._admit_reads(graph, facts, first.captures, new)
        results = [n for name, n in self.graph.outputs if name in ("score", "mask") and report]
        self.reporting = frozenset(_reachable(results, lambda n: False))
        self.uses: dict[Node, int] = {}
        for n in self.graph.nodes:
            for a in n.args:
                self.uses[a] = self.uses.get(a, 0) + 1
        self.offset = dict.fromkeys(HOISTED, 0)  # of its values in head, rows and columns
        self.hoisted = {level: self._hoisted(level) for level in HOISTED}

    def _admit_reads(self, graph: Graph, facts: ModFacts, captures: Sequence[CaptureFact],
                     new: Mapping[Node, Node]) -> None:
        loads = [n for n in graph.nodes if n.op is Op.LOAD]
        for n, dims in zip(loads, facts.reads, strict=True):
            known = self.reads.setdefault(new[n], _Read(
                f"args.{self.prefix}{n.attr}", len(self.reads), captures[n.attr], dims))
            known.dims = tuple(
                ReadFact(a.negative or b.negative, a.below or b.below, a.above or b.above)
                for a, b in zip(known.dims, dims, strict=True))

    def _hoisted(self, level: int) -> list[Node]:
        """Values of this level that other levels, or the results, are made from."""
        wanted = {a for n in self.graph.nodes if self.level[n] != level for a in n.args}
        wanted |= {n for _, n in self.graph.outputs}
        return [n for n in self.graph.nodes if n in wanted and self.level[n] == level
                and (n.op not in LEAVES or n.op is Op.LOAD)]

    def reported(self, level: int) -> list[Node]:
        """Reads of this level that may leave their tensor, which is to be reported."""
        return [n for n, read in self.reads.items() if n in self.reporting
                and self.level[n] == level and not all(d.proven for d in read.dims)]

    def root(self, name: str) -> Node:
        return self.graph.output(name)


class Writer:
    """Writes nodes of one role into the lines of one function of a level."""

    def __init__(self, role: Role, level: int, lines: list[str]) -> None:
        self.role, self.level, self.lines = role, level, lines
        self.names: dict[Node, str] = {}
        self.outside: dict[Node, str] = {}  # unproven read -> where its index left the tensor
        for other, where in HOISTED.items():
            if other != level and other & level == other:
                start = role.offset[other]
                for i, n in enumerate(role.hoisted[other]):
                    self.names[n] = f"{where}[{start + i}]"
                for i, n in enumerate(role.reported(other), len(role.hoisted[other])):
                    self.outside[n] = f"{where}[{start + i}]"

    def value(self, root: Node) -> str:
        """An expression for the node; what it needs is written before."""
        for n in self._needed(root):
            self.names[n] = self._expression(n)
        return self.names[root]

    def reported_reads(self, root: Node) -> list[Node]:
        """Reads that `root` is made from which may leave their tensor, after value(root)."""
        below = set(_reachable([root], lambda n: False))
        return [n for n in self.outside if n in below & self.role.reporting]

    def offset(self, load: Node) -> str:
        """Elements between the start of a contiguous tensor of the capture's shape and a read."""
        read = self.role.reads[load]
        for a in load.args:
            self.value(a)
        total = ""
        for d in range(len(load.args)):
            index = self._wide(read, self._index(load, d))
            total = index if not total else (
                f"({total}) * {read.argument}_size{d} + {index}")
        return total or "b * 0"

    def name(self, text: str, stem: str = "x") -> str:
        """A new variable that holds the expression."""
        name = f"{stem}{len(self.lines)}"
        self.lines.append(f"{name} = {text}")
        return name

    def _needed(self, root: Node) -> list[Node]:
        return [n for n in _reachable([root], lambda n: n in self.names) if n not in self.names]

    def _expression(self, n: Node) -> str:
        if n.op is Op.LOAD:
            return self._load(n)
        if n.op is Op.INPUT:
            return n.attr
        if n.op is Op.NUMBER:
            return f"args.{self.role.prefix}_number{n.attr}"
        if n.op is Op.CONST:
            return literal(n.attr, n.dtype)
        text = TABLE[n.op](self.role.context, n, *self._operands(n))
        text = self._stored(n, text)
        if self.role.uses.get(n, 0) > 1 or len(text) > _INLINE:
            return self.name(text)
        return text if text.isidentifier() or _is_call(text) else f"({text})"

    def _operands(self, n: Node) -> list[str]:
        """Names of the arguments, widened where the operation needs 64 bits."""
        found = [self.names[a] for a in n.args]
        if n.op in _READ_TWICE:
            found = [text if text.isidentifier() or a.is_const else self.name(text)
                     for text, a in zip(found, n.args, strict=True)]
        integers = [a for a in (n, *n.args) if a.dtype is torch.int64]
        if n.op is not Op.CAST and any(self._storage(a) == "int64" for a in integers):
            found = [f"{text}.to(tl.int64)" if self._storage(a) == "int32"
                     and a.dtype is torch.int64 and not a.is_const else text
                     for text, a in zip(found, n.args, strict=True)]
        return found

    def _storage(self, n: Node) -> str:
        return self.role.context.storage(n)

    def _stored(self, n: Node, text: str) -> str:
        """The result of an operation in the form its node is held in."""
        half = TYPE_NAMES[n.dtype]
        if n.dtype in HALVES and n.op not in _EXACT:
            if n.op is Op.CAST:
                return f"tl.cast({self.names[n.args[0]]}, tl.{half}).to(tl.float32)"
            return f"({text}).to(tl.{half}).to(tl.float32)"
        wide = any(a.dtype is torch.int64 and self._storage(a) == "int64" for a in n.args)
        if wide and n.dtype is torch.int64 and n.op is not Op.CAST and self._storage(n) == "int32":
            return f"({text}).to(tl.int32)"
        return text

    # Captured tensors

    def _load(self, n: Node) -> str:
        read = self.role.reads[n]
        gathered = self.level == TILE and self.role.context.target == "cuda"
        terms = [read.argument]
        for d, stride in enumerate(read.capture.unit):
            apart = self._apart(n, d) if gathered and stride else None
            index = apart or self._wide(read, self._index(n, d))
            terms.append(index if stride else f"{index} * {read.argument}_stride{d}")
        text = f"{'math.gather' if gathered else 'tl.load'}({' + '.join(terms)})"
        return self.name(text + (".to(tl.float32)" if n.dtype in HALVES else ""), "load")

    def _apart(self, n: Node, d: int) -> str | None:
        """An index that is a sum of rows and columns as two steps of a 64-bit address: then a
        column's distance from its neighbours is a constant of the instruction that reads it."""
        index, fact = n.args[d], self.role.reads[n].dims[d]
        if index.op not in (Op.ADD, Op.SUB) or fact.negative or not fact.proven:
            return None
        terms = [(f"({self.names[a]}).to(tl.int64)", self.role.level[a]) for a in index.args]
        (first, level), (second, other) = terms
        if TILE in (level, other) or level == COLUMNS:
            return None
        return f"{first} {'+' if index.op is Op.ADD else '-'} {second}"

    def _wide(self, read: _Read, index: str) -> str:
        if not read.capture.wide:
            return index
        return f"({index})" if index.isdigit() else f"({index}).to(tl.int64)"

    def _index(self, n: Node, d: int) -> str:
        """The index of one dimension, counted from the front and inside the tensor."""
        index, read = self.names[n.args[d]], self.role.reads[n]
        fact, size = read.dims[d], f"{read.argument}_size{d}"
        if n.args[d].is_const and n.args[d].attr < 0:
            index = f"({size} - {-n.args[d].attr})"
        elif fact.negative:
            index = self.name(index) if not index.isidentifier() else index
            index = self.name(f"tl.where({index} < 0, {index} + {size}, {index})", "index")
        if fact.proven:
            return index
        index = self.name(index) if not index.isidentifier() else index
        left = " | ".join([f"({index} < 0)"] * fact.below + [f"({index} >= {size})"] * fact.above)
        before = self.outside.get(n)
        self.outside[n] = self.name(f"({before}) | {left}" if before else left, "outside")
        return self.name(f"tl.minimum(tl.maximum({index}, 0), {size} - 1)", "index")


def _reachable(roots: Sequence[Node], stop: Callable[[Node], bool]) -> list[Node]:
    """Arguments before users, without what lies below a node where `stop` holds."""
    order: dict[Node, None] = {}
    stack = [(root, False) for root in reversed(roots)]
    while stack:
        n, done = stack.pop()
        if n in order:
            continue
        if done or stop(n):
            order[n] = None
        else:
            stack.append((n, True))
            stack.extend((a, False) for a in reversed(n.args))
    return list(order)


def _is_call(text: str) -> bool:
    """Whether the text is one call, and needs no parentheses inside of an expression."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if letter in " " and depth == 0:
            return False
        if i and depth < 0:
            return False
    return text.endswith((")", "]"))
