"""Probabilities and the gradient of the scores on one tile, through the score mod.

In, in scratch memory: s = scale q k^T, d p = d_out v^T, which scores are attended. Out, in their
place: p = 2^(log2(e) mod(s) - lse) and d s = d mod/d s * p * (d p - delta), zeros where nothing
is attended; and what the mod's captured tensors get is added to their gradients.
"""

from __future__ import annotations

from collections.abc import Callable

from flexattn.kernels.cpu_backward_frame import ARGUMENTS, BackwardFrame
from flexattn.kernels.cpu_dsl import Function, Module, Value, const, i64
from flexattn.kernels.cpu_frame import LOG2_E, PLACE, Arguments, Place
from flexattn.kernels.cpu_sites import ColumnSite, GradientSite, KernelGradient, VectorSite
from flexattn.kernels.cpu_softmax import bits_at


class Slopes:
    """Emits one function: slopes_*(arguments, scratch, gradients, PLACE...)."""

    def __init__(self, module: Module, frame: BackwardFrame, mod: KernelGradient | None,
                 masked: bool, accumulate: bool) -> None:
        name = f"slopes_{'partial' if masked else 'full'}{'_accumulate' if accumulate else ''}"
        self.e = e = module.function(name, ["ptr", "ptr", "ptr", *PLACE])
        self.frame, self.mod, self.accumulate = frame, mod, accumulate
        self.a, self.scratch, self.gradients = Arguments(e, e.params[0], ARGUMENTS), *e.params[1:3]
        self.place = Place(*e.params[3:])
        self.bits = self._array("attended") if masked else None
        self.column_arrays: list[tuple[Value, str]] = []

    def _array(self, name: str) -> Value:
        return self.frame.array(self.e, self.scratch, name)

    def emit(self) -> Function:
        e, place = self.e, self.place
        if self.mod is not None:
            self._tables = [self.a.address(f"score_{n}") for n in ("captures", "numbers", "fault")]
            self._hoist_columns(self.mod)
        heads = e.mul(self.a.get("kv_heads"), self.a.get("group"))
        line = e.mul(e.add(e.mul(place.b, heads), place.h), self.a.get("q_len"))
        line = e.add(line, place.q_start)
        lse, delta = (e.at(self.a.address(n), line, e.real) for n in ("row_lse", "row_delta"))
        with e.loop(0, place.rows) as row:
            p, d_p = self._row("scores", row.index), self._row("slopes", row.index)
            first, last = (e.load(self._array(n), "i64", row.index)
                           for n in ("first", "last"))
            for start, end in ((i64(0), e.min(first, place.width)),
                               (e.max(last, first), place.width)):
                self._clear(p, d_p, start, end)
            self._one_row(row.index, p, d_p, (first, last),
                          *(e.splat(e.load(x, e.real, row.index)) for x in (lse, delta)))
        multiple = self.frame.multiple
        end = e.and_(e.add(place.rows, i64(multiple - 1)), i64(-multiple))
        with e.loop(place.rows, end) as row:
            self._clear(self._row("scores", row.index), self._row("slopes", row.index), i64(0),
                        place.width)
        e.ret()
        return e.function

    def _row(self, name: str, row: Value) -> Value:
        at = self.e.mul(row, i64(self.frame.score_stride))
        return self.e.at(self._array(name), at, self.e.real)

    def _clear(self, p: Value, d_p: Value, start: Value, end: Value) -> None:
        e = self.e
        with e.loop(start, end, e.lanes) as column:
            for array in (p, d_p):
                e.store(e.number(0.0), array, column.index)

    def _hoist_columns(self, mod: KernelGradient) -> None:
        """Keep what per_column gives in consecutive arrays."""
        e, place = self.e, self.place
        with e.loop(0, place.width, e.lanes) as loop:
            site = ColumnSite(place.b, place.h, e.add(place.kv_start, loop.index), *self._tables)
            values = mod.per_column(e, site)
            for i, x in enumerate(values):
                e.store(x, self._column_array(i), loop.index)
        self.column_arrays = [(self._column_array(i), x.type) for i, x in enumerate(values)]

    def _column_array(self, number: int) -> Value:
        return self.e.at(self._array("columns"), number * self.frame.column_array_bytes, "i8")

    def _one_row(self, row: Value, p: Value, d_p: Value, span: tuple[Value, Value],
                 lse: Value, delta: Value) -> None:
        e, mod = self.e, self.mod
        if mod is None:
            with e.loop(span[0], span[1], self.frame.columns) as loop:
                for j in range(self.frame.tile.vectors):
                    self._plain(row, p, d_p, e.add(loop.index, i64(j * e.lanes)), lse, delta)
            return
        captures, numbers, fault = self._tables
        site = GradientSite(self.place.b, self.place.h, e.add(self.place.q_start, row), captures,
                            numbers, fault, self.gradients)
        values = mod.per_row(e, site)
        sums = mod.row_sums(e) if self.accumulate else []
        with e.loop(span[0], span[1], e.lanes, sums) as loop:
            column = loop.index
            kept = [e.load(array, type, column) for array, type in self.column_arrays]
            attended = self._attended(row, column)
            vector = mod.begin_vector(e, VectorSite(
                site, e.add(self.place.kv_start, column), values, kept, attended),
                e.load(p, e.vector, column))
            exponent = e.fma(vector.score(), e.number(LOG2_E), lse)
            grad = self._probability(p, d_p, column, attended, exponent, delta)
            e.store(vector.d_score(grad), d_p, column)
            loop.next = vector.accumulate(loop.values) if self.accumulate else []
        if self.accumulate:
            mod.end_row(e, site, values, loop.values)

    def _plain(self, row: Value, p: Value, d_p: Value, column: Value, lse: Value,
               delta: Value) -> None:
        """Without a mod, s comes in powers of 2 already."""
        e = self.e
        exponent = e.fadd(e.load(p, e.vector, column), lse)
        grad = self._probability(p, d_p, column, self._attended(row, column), exponent, delta)
        e.store(grad, d_p, column)

    def _attended(self, row: Value, column: Value) -> Value:
        if self.bits is None:
            return const(self.e.vec("i1"), True)
        return self.e.load_bits(bits_at(self.e, self.frame, self.bits, row, column))

    def _probability(self, p: Value, d_p: Value, column: Value, attended: Value, exponent: Value,
                     delta: Value) -> Value:
        """Stores p; gives the cotangent of the mod's result."""
        e, zero = self.e, self.e.number(0.0)
        kept: Callable[[Value], Value] = (
            (lambda x: x) if self.bits is None else lambda x: e.select(attended, x, zero))
        x = kept(e.exp2(exponent))
        e.store(x, p, column)
        return kept(e.fmul(x, e.fsub(e.load(d_p, e.vector, column), delta)))
