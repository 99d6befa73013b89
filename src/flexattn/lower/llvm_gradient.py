"""A score mod and its gradient as the CPU backward kernel injects them.

In: one graph with outputs "score", "d_score" and "d_load<i>" (inputs score and grad), and the LOAD
nodes that the d_load belong to (analysis.gradient). Out: an `LlvmGradient`, the hooks of
flexattn.kernels.cpu_sites.KernelGradient. Rejects nothing.

The gradient of a captured tensor is added up in a table like that of captures, of float (double for
float64) elements. A read whose index is one for the whole row is summed over the row first; one
whose lanes are consecutive elements adds a vector; what else adds lane by lane.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from flexattn.ir.graph import Graph, Node
from flexattn.lower.integer_ranges import integer_ranges
from flexattn.lower.llvm_lanes import Value, real_type
from flexattn.lower.llvm_load import Read
from flexattn.lower.llvm_mod import Code, LlvmMod, Position


class LlvmGradient(LlvmMod):
    """Implements KernelGradient."""

    def __init__(self, graph: Graph, loads: Sequence[Node], index_bound: int) -> None:
        super().__init__(graph, index_bound)
        self.loads = tuple(loads)
        indices = Graph(tuple((str(i), n) for i, n in enumerate(loads)), graph.captures,
                        graph.numbers)
        self.ranges = {**integer_ranges(indices.nodes, index_bound), **self.ranges}

    @property
    def accumulates(self) -> bool:
        """Whether any captured tensor has a gradient."""
        return bool(self.loads)

    def row_sums(self, e: Any) -> list[Value]:
        """Zeros that `GradientVector.accumulate` adds a row's sums to."""
        return [e.const(e.vec(real_type(n.dtype)), 0.0) for n in self.loads if self._is_sum(n)]

    def _is_sum(self, n: Node) -> bool:
        """One index for the whole row."""
        return all(self.levels.affine(a) == 0 for a in n.args)

    def begin_vector(self, e: Any, site: Any, score: Value) -> GradientVector:
        code = self.vector_code(e, site)
        code.give("score", score)
        return GradientVector(self, code, site.attended)

    def end_row(self, e: Any, site: Any, row_values: Sequence[Value],
                sums: Sequence[Value]) -> None:
        """Add what a row summed."""
        rows, _ = self._found(e, site)
        code = Code(self, e, Position.of(site))
        code.rows = dict(zip(rows, row_values, strict=True))
        whole = [n for n in self.loads if self._is_sum(n)]
        for n, total in zip(whole, sums, strict=True):
            _add_scalar(e, Read(code, n, "gradients").start, e.reduce(total, e.fadd))

    def _emit_everything(self, code: Code) -> None:
        super()._emit_everything(code)
        vector = GradientVector(self, code, code.e.const(code.e.vec("i1"), True))
        vector.accumulate(self.row_sums(code.e))
        for n in self.loads:
            _ = Read(code, n, "gradients").start


@dataclass
class GradientVector:
    """One vector of scores: the mod's result, then what a cotangent of it gives."""

    mod: LlvmGradient
    code: Code
    attended: Value

    def score(self) -> Value:
        return self.code.output("score")

    def d_score(self, grad: Value) -> Value:
        """`grad` is 0 in lanes that are not attended; so is the result, whatever the mod does."""
        self.code.give("grad", grad)
        return self._kept(self.code.output("d_score"))

    def accumulate(self, sums: Sequence[Value]) -> list[Value]:
        """Add the gradients of captured tensors; the row's sums with this vector's parts."""
        totals, following = iter(sums), []
        for i, n in enumerate(self.mod.loads):
            part = self._kept(self.code.output(f"d_load{i}"))
            if self.mod._is_sum(n):
                following.append(self.code.e.fadd(next(totals), part))
            else:
                _add_vector(Read(self.code, n, "gradients"), part)
        return following

    def _kept(self, x: Value) -> Value:
        return self.code.e.select(self.attended, x, self.code.e.const(x.type, 0.0))


def _add_scalar(e: Any, address: Value, x: Value) -> None:
    e.store(e.fadd(e.load(address, x.type), x), address)


def _add_vector(to: Read, part: Value) -> None:
    """Add the lanes to the elements that a read's lanes come from."""
    if to.is_affine:
        e, _ = to.e, (to.start, to.strides)
        offset, fine = to.run()
        e.if_else(fine, lambda: _add_run(to, offset, to.direction, part),
                  lambda: _add_lanes(to, to.offsets()[0], part))
    else:
        _add_anywhere(to, part)


def _add_anywhere(to: Read, part: Value) -> None:
    e, start = to.e, to.start
    offsets, _ = to.offsets()
    first = e.extract(offsets, 0)
    distance = e.sub(offsets, e.splat(first))

    def one() -> list[Value]:
        _add_scalar(e, e.at(start, first, to.type), e.reduce(part, e.fadd))
        return []

    def choose(patterns: list[tuple[int, Callable[[], list[Value]]]]) -> list[Value]:
        if not patterns:
            return _add_lanes(to, offsets, part)
        (step, add), *others = patterns
        line = e.const_vector("i64", [step * lane for lane in range(e.lanes)])
        return e.if_else(e.all(e.compare("eq", distance, line)), add, lambda: choose(others))

    choose([(0, one), (1, lambda: _add_run(to, first, 1, part)),
            (-1, lambda: _add_run(to, first, -1, part))])


def _add_run(to: Read, offset: Value, direction: int, part: Value) -> list[Value]:
    """Consecutive elements, that of lane 0 at `offset`."""
    e = to.e
    if direction < 0:
        offset = e.sub(offset, e.const("i64", e.lanes - 1))
        part = e.shuffle(part, part, range(e.lanes - 1, -1, -1))
    address = e.at(to.start, offset, to.type)
    e.store(e.fadd(e.load(address, part.type), part), address)
    return []


def _add_lanes(to: Read, offsets: Value, part: Value) -> list[Value]:
    e = to.e
    for lane in range(e.lanes):
        _add_scalar(e, e.at(to.start, e.extract(offsets, lane), to.type), e.extract(part, lane))
    return []
