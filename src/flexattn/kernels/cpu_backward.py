"""Backward of fused attention on a CPU: any mod, any mask, nothing of size Q x KV.

In: the address of `ARGUMENTS`. Out: d_query, d_key, d_value, and the gradients of tensors captured
by the score mod. Every thread of a team calls, one after the other, `prepare`, `by_columns` and
(with two passes) `by_rows`.

    delta = sum(d_out * out) - d_lse                                     prepare
    for each tile of keys, each query head of it, each tile of queries:  by_columns
        s = q k^T; d_p = d_out v^T
        p = 2^(mod(s) - lse); d_s = d mod/d s * p * (d_p - delta)
        d_v += p^T d_out; d_k += d_s^T q; d_q += d_s k

One pass: a unit of work is all keys of a key head, so that no two units add to the same d_query.
Two passes, where there are fewer heads than threads: a unit is one tile of keys, and `by_rows` has
d_query, tile by tile of queries. Units are dealt to lanes and threads claim lanes, so that no
result depends on which thread does what. Rejects nothing: flexattn.runtime.launch_cpu_backward
checks and prepares everything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from flexattn.kernels.cpu_backward_frame import (
    ARGUMENTS,
    COUNTER_WORDS,
    PHASES,
    PREPARED_ROWS,
    BackwardFrame,
)
from flexattn.kernels.cpu_backward_tiles import (
    emit_add_lines,
    emit_by_keys,
    emit_by_queries,
    emit_clear,
    emit_load_lines,
    emit_load_pairs,
    emit_outer,
    emit_pairs,
    emit_spans,
    emit_store_lines,
)
from flexattn.kernels.cpu_dsl import NULL, Emitter, Function, Module, Value, const, i64
from flexattn.kernels.cpu_frame import LN_2, LOG2_E, PLACE, Arguments, Place
from flexattn.kernels.cpu_pack import emit_copy_rows, emit_pack
from flexattn.kernels.cpu_rows import score_factor
from flexattn.kernels.cpu_sites import KernelGradient, KernelMod
from flexattn.kernels.cpu_slopes import Slopes
from flexattn.kernels.cpu_softmax import emit_attend, emit_attend_all


class Backward:
    """The kernel for one dtype, head dimensions, and mods."""

    def __init__(self, frame: BackwardFrame, score: KernelGradient | None = None,
                 mask: KernelMod | None = None) -> None:
        self.frame, self.score, self.mask = frame, score, mask
        self.module = Module(frame.tile.vector_bits, frame.storage)

    def emit(self) -> str:
        """The whole module; exports PHASES and `scratch_bytes() -> i64`."""
        module, frame = self.module, self.frame
        self._emit_parts()
        self._prepare()
        self._by_columns(self._column_tile(self._column_pair()))
        self._by_rows(self._row_tile(self._row_pair()))
        e = module.function("scratch_bytes", [], result="i64", export=True)
        e.ret(i64(frame.bytes(self._column_arrays)))
        return str(module)

    def _emit_parts(self) -> None:
        module, frame = self.module, self.frame
        q_dim, v_dim = frame.head_dim, frame.value_dim
        self._attend, arrays = emit_attend(module, frame, ARGUMENTS, self.mask)
        self._attend_all = emit_attend_all(module, frame)
        self._spans = emit_spans(module, frame)
        self._pack = emit_pack(module, frame.columns, frame.pairs)
        self._clear = emit_clear(module)
        if frame.pairs:
            self._pairs = emit_pairs(module, frame)
            self._copy = {dim: emit_copy_rows(module, f"copy_{dim}", dim, 2 * frame.row_words(dim))
                          for dim in {q_dim, v_dim}}
        emit_load = emit_load_pairs if frame.pairs else emit_load_lines
        self._load = {dim: emit_load(module, frame, f"load_{dim}", dim)
                      for dim in {q_dim, v_dim}}
        self._store = {dim: emit_store_lines(module, frame, f"store_{dim}", dim)
                       for dim in {q_dim, v_dim}}
        self._add = emit_add_lines(module, frame, q_dim)
        self._outer = (emit_outer(module, frame, "scores", q_dim, "query", "key_panels", "scores"),
                       emit_outer(module, frame, "d_p", v_dim, "d_out", "value_panels", "slopes"))
        p, d_out, d_s, query = frame.summed_over_rows
        self._by_keys = (emit_by_keys(module, frame, "d_value", v_dim, p, d_out, "d_value"),
                         emit_by_keys(module, frame, "d_key", q_dim, d_s, query, "d_key"))
        self._by_queries = emit_by_queries(module, frame)
        self._slopes: dict[tuple[bool, bool], Function] = {}
        accumulates = self.score is not None and self.score.accumulates
        for masked in (False, True):
            for accumulate in {False, accumulates}:
                slopes = Slopes(module, frame, self.score, masked, accumulate)
                self._slopes[masked, accumulate] = slopes.emit()
                arrays = max(arrays, len(slopes.column_arrays))
        self._column_arrays = arrays

    # What one tile is made of

    def _real(self, e: Emitter, x: Value) -> Value:
        return x if e.real == "double" else e.cast("fptrunc", x, e.real)

    def _late_scale(self, e: Emitter, a: Arguments) -> Value:
        """The scale of d_query, where that of the keys could not hold it."""
        return self._real(e, a.get("scale", "double")) if self.frame.pairs else e.scalar(1.0)

    def _load_queries(self, e: Emitter, a: Arguments, scratch: Value, b: Value, h: Value,
                      q_start: Value, rows: Value) -> None:
        """Lines of the query, scaled where it is no pairs, and of d_out."""
        frame = self.frame
        for tensor, dim, stride_d, factor in (
                ("query", frame.head_dim, a.get("query_d"),
                 score_factor(e, a, self.score is not None)),
                ("d_out", frame.value_dim, i64(1), e.scalar(1.0))):
            source = e.at(a.address(tensor), a.offset(tensor, b=b, h=h, s=q_start), frame.word)
            rest = a.get(f"{tensor}_s"), stride_d, rows
            lines = frame.array(e, scratch, tensor)
            if frame.pairs:
                end = e.and_(e.add(rows, i64(frame.multiple - 1)), i64(-frame.multiple))
                e.call(self._copy[dim], source, *rest, end, lines)
                e.call(self._load[dim], source, *rest, end,
                       frame.array(e, scratch, f"{tensor}_pairs"))
            else:
                e.call(self._load[dim], source, *rest, factor, lines)

    def _load_keys(self, e: Emitter, a: Arguments, scratch: Value, head: tuple[Value, Value],
                   start: Value, count: Value, width: Value) -> None:
        """Panels of keys and values; lines of the keys, scaled where they are no pairs."""
        frame = self.frame
        for tensor, dim in (("key", frame.head_dim), ("value", frame.value_dim)):
            source = e.at(a.address(tensor), a.offset(tensor, b=head[0], h=head[1], s=start),
                          frame.word)
            stride, stride_d = a.get(f"{tensor}_s"), a.get(f"{tensor}_d")
            panels = frame.array(e, scratch, f"{tensor}_panels")
            with e.loop(0, width, frame.columns) as column:
                e.call(self._pack, e.at(source, e.mul(column.index, stride), frame.word), stride,
                       stride_d, e.min(e.sub(count, column.index), i64(frame.columns)), i64(dim),
                       i64(frame.depth(dim)),
                       e.at(panels, e.mul(column.index, i64(frame.depth(dim))), frame.word))
            lines = frame.array(e, scratch, "keys")
            if tensor == "key" and frame.pairs:
                e.call(self._load[dim], source, stride, stride_d, count, width, lines)
            elif tensor == "key":
                e.call(self._load[dim], source, stride, stride_d, count,
                       self._real(e, a.get("scale", "double")), lines)
                rest = e.at(lines, e.mul(count, i64(frame.line(dim))), e.real)
                e.call(self._clear, rest, e.mul(e.sub(width, count), i64(frame.line(dim))))

    def _emit_slopes(self, e: Emitter, a: Arguments, scratch: Value, gradients: Value,
                     place: Place, whole: Value, accumulate: str) -> None:
        """p and d s of a tile whose operands are loaded."""
        where = list(vars(place).values())
        full = place.is_whole(e)
        if self.mask is not None:
            full = e.and_(full, whole)

        def attend_all() -> list[Value]:
            e.call(self._attend_all, scratch, place.width)
            return []

        def attend() -> list[Value]:
            e.call(self._attend, a.pointer, scratch, *where, whole)
            return []

        e.if_else(full, attend_all, attend)
        factors = score_factor(e, a, self.score is not None), e.scalar(1.0)
        for outer, factor in zip(self._outer, factors, strict=True):
            e.call(outer, scratch, place.rows, place.width, factor)
        wanted = e.compare("ne", a.get(accumulate), i64(0))
        partial = e.op("xor", full, const("i1", True))
        for (masked, accumulates), function in self._slopes.items():
            condition = partial if masked else full
            if len(self._slopes) > 2:
                chosen = wanted if accumulates else e.op("xor", wanted, const("i1", True))
                condition = e.and_(condition, chosen)
            with e.if_(condition):
                e.call(function, a.pointer, scratch, gradients, *where)
        if self.frame.pairs:
            e.call(self._pairs, scratch, place.rows, place.width)

    # By columns: one tile of keys

    def _column_pair(self) -> Function:
        """column_pair(arguments, scratch, gradients, total d_query, PLACE..., whole)."""
        e = self.module.function("column_pair", ["ptr", "ptr", "ptr", "ptr", *PLACE, "i1"])
        a, (scratch, gradients, total) = Arguments(e, e.params[0], ARGUMENTS), e.params[1:4]
        place, whole = Place(*e.params[4:-1]), e.params[-1]
        self._load_queries(e, a, scratch, place.b, place.h, place.q_start, place.rows)
        self._emit_slopes(e, a, scratch, gradients, place, whole, "accumulate_by_columns")
        e.call(self._spans, scratch, place.rows, place.width)
        for product in self._by_keys:
            e.call(product, scratch, place.width)
        with e.if_(e.compare("ne", total, NULL)):
            lines = self.frame.array(e, scratch, "d_query")
            dim = self.frame.head_dim
            e.call(self._clear, lines, e.mul(place.rows, i64(self.frame.line(dim))))
            e.call(self._by_queries, scratch, place.rows)
            at = e.add(a.offset("total", b=place.b, h=place.h), e.mul(place.q_start, i64(dim)))
            e.call(self._add, lines, place.rows, self._late_scale(e, a), e.at(total, at, e.real))
        e.ret()
        return e.function

    def _column_tile(self, pair: Function) -> Function:
        """column_tile(arguments, scratch, gradients, total d_query, kv batch, kv head, tile)."""
        e = self.module.function("column_tile", ["ptr"] * 4 + ["i64"] * 3)
        a, (scratch, gradients, total) = Arguments(e, e.params[0], ARGUMENTS), e.params[1:4]
        kv_b, kv_h, tile = e.params[4:]
        column, start, count = _tile(e, a, "column", tile, a.get("kv_len"))
        with e.if_(e.compare("sgt", count, i64(0))):
            size = i64(self.frame.columns)
            width = e.mul(e.op("sdiv", e.add(count, i64(self.frame.columns - 1)), size), size)
            self._load_keys(e, a, scratch, (kv_b, kv_h), start, count, width)
            for name in ("d_key", "d_value"):
                e.call(self._clear, self.frame.array(e, scratch, name),
                       i64(self.frame.elements(name)))
            for_each = self._queries_of(e, a, kv_b, kv_h)
            with for_each as (b, h):
                line = e.add(a.offset("columns", b=b, h=h), column)

                def one(q_start: Value, rows: Value, whole: Value) -> None:
                    e.call(pair, a.pointer, scratch, gradients, total, b, h, q_start, rows, start,
                           i64(0), count, width, whole)

                self._each_run(e, a, "column", line, a.get("q_len"), self.frame.tile.tile_q, one)
            self._store_keys(e, a, scratch, kv_b, kv_h, start, count)
        e.ret()
        return e.function

    @contextmanager
    def _queries_of(self, e: Emitter, a: Arguments, kv_b: Value,
                    kv_h: Value) -> Iterator[tuple[Value, Value]]:
        """The batch entries and query heads that a key head serves."""
        group = a.get("group")
        shared = e.op("sdiv", a.get("batches"), a.get("kv_batches"))
        with e.loop(0, e.mul(shared, group)) as one:
            b = e.add(e.mul(kv_b, shared), e.op("sdiv", one.index, group))
            yield b, e.add(e.mul(kv_h, group), e.op("srem", one.index, group))

    def _each_run(self, e: Emitter, a: Arguments, table: str, line: Value, length: Value,
                  tile: int, body: Callable[[Value, Value, Value], None]) -> None:
        """body(start, count, whole) for the tiles of the blocks in a row of runs."""

        def entry(name: str, index: Value) -> Value:
            return e.cast("sext", e.load(a.address(f"{table}_{name}"), "i32", index), "i64")

        block = a.get(f"{table}_other")
        with e.loop(entry("offsets", line), entry("offsets", e.add(line, i64(1)))) as run:
            begin = e.mul(entry("start", run.index), block)
            end = e.min(e.mul(entry("end", run.index), block), length)
            kind = e.load(a.address(f"{table}_full"), "i8", run.index)
            whole = e.compare("ne", kind, const("i8", 0))
            with e.loop(begin, end, tile) as start:
                body(start.index, e.min(i64(tile), e.sub(end, start.index)), whole)

    def _store_keys(self, e: Emitter, a: Arguments, scratch: Value, kv_b: Value, kv_h: Value,
                    start: Value, count: Value) -> None:
        """d_key and d_value of a tile; d_key is of queries that were scaled."""
        head = e.add(e.mul(kv_b, a.get("kv_heads")), kv_h)
        line = e.add(e.mul(head, a.get("kv_len")), start)
        unscaled = e.scalar(1.0 if self.score is not None else LN_2)
        if self.frame.pairs:
            unscaled = self._late_scale(e, a)
        for name, dim, factor in (("d_key", self.frame.head_dim, unscaled),
                                  ("d_value", self.frame.value_dim, e.scalar(1.0))):
            target = e.at(a.address(name), e.mul(line, i64(dim)), self.frame.word)
            e.call(self._store[dim], self.frame.array(e, scratch, name),
                   i64(self.frame.line(dim)), count, factor, target)

    def _by_columns(self, tile: Function) -> None:
        """by_columns(arguments)."""
        e = self.module.function("by_columns", ["ptr"], export=True)
        a = Arguments(e, e.params[0], ARGUMENTS)
        total, slot, scratch = a.address("total_d_query"), *_scratch(e, a, "by_columns")
        own = e.at(total, e.mul(slot, a.get("total_unit")), e.real)
        with _units(e, a, "by_columns", "column") as (unit, gradients):
            tiles = e.mul(a.get("column_tiles"), _blocks(e, a, "column", a.get("kv_len")))
            span = a.get("columns_a_unit")
            parts = e.op("sdiv", e.add(tiles, e.sub(span, i64(1))), span)
            head, first = e.op("sdiv", unit, parts), e.mul(e.op("srem", unit, parts), span)
            kv_b, kv_h = (e.op(op, head, a.get("kv_heads")) for op in ("sdiv", "srem"))
            private = e.compare("ne", a.get("total_unit"), i64(0))
            with e.if_(private):
                e.call(self._clear, own, a.get("total_unit"))
            shift = e.sub(i64(0), a.offset("total", b=self._first_batch(e, a, kv_b),
                                           h=e.mul(kv_h, a.get("group"))))
            base = e.select(private, e.at(own, shift, e.real), total)
            with e.loop(first, e.min(e.add(first, span), tiles)) as one:
                e.call(tile, a.pointer, scratch, gradients, base, kv_b, kv_h, one.index)
            with e.if_(private):
                self._store_total(e, a, base, kv_b, kv_h)
        e.ret()

    def _first_batch(self, e: Emitter, a: Arguments, kv_b: Value) -> Value:
        return e.mul(kv_b, e.op("sdiv", a.get("batches"), a.get("kv_batches")))

    def _store_total(self, e: Emitter, a: Arguments, base: Value, kv_b: Value,
                     kv_h: Value) -> None:
        """d_query of a key head's queries, rounded."""
        dim, q_len = i64(self.frame.head_dim), a.get("q_len")
        with self._queries_of(e, a, kv_b, kv_h) as (b, h):
            target = e.at(a.address("d_query"), e.mul(_query_line(e, a, b, h, i64(0)), dim),
                          self.frame.word)
            source = e.at(base, a.offset("total", b=b, h=h), e.real)
            e.call(self._store[self.frame.head_dim], source, dim, q_len, e.scalar(1.0), target)

    # By rows: one tile of queries

    def _row_pair(self) -> Function:
        """row_pair(arguments, scratch, gradients, PLACE..., whole)."""
        e = self.module.function("row_pair", ["ptr", "ptr", "ptr", *PLACE, "i1"])
        a, (scratch, gradients) = Arguments(e, e.params[0], ARGUMENTS), e.params[1:3]
        place, whole = Place(*e.params[3:-1]), e.params[-1]
        shared = e.op("sdiv", a.get("batches"), a.get("kv_batches"))
        head = e.op("sdiv", place.b, shared), e.op("sdiv", place.h, a.get("group"))
        self._load_keys(e, a, scratch, head, place.kv_start, place.count, place.width)
        self._emit_slopes(e, a, scratch, gradients, place, whole, "accumulate_by_rows")
        e.call(self._by_queries, scratch, place.rows)
        e.ret()
        return e.function

    def _row_tile(self, pair: Function) -> Function:
        """row_tile(arguments, scratch, gradients, b, h, tile)."""
        e = self.module.function("row_tile", ["ptr"] * 3 + ["i64"] * 3)
        a, (scratch, gradients) = Arguments(e, e.params[0], ARGUMENTS), e.params[1:3]
        b, h, tile = e.params[3:]
        row, q_start, rows = _tile(e, a, "row", tile, a.get("q_len"))
        with e.if_(e.compare("sgt", rows, i64(0))):
            self._load_queries(e, a, scratch, b, h, q_start, rows)
            lines, dim = self.frame.array(e, scratch, "d_query"), self.frame.head_dim
            e.call(self._clear, lines, e.mul(rows, i64(self.frame.line(dim))))

            def one(start: Value, count: Value, whole: Value) -> None:
                size = i64(self.frame.columns)
                panels = e.op("sdiv", e.add(count, i64(self.frame.columns - 1)), size)
                e.call(pair, a.pointer, scratch, gradients, b, h, q_start, rows, start, i64(0),
                       count, e.mul(panels, size), whole)

            line = e.add(a.offset("rows", b=b, h=h), row)
            self._each_run(e, a, "row", line, a.get("kv_len"), self.frame.tile.tile_kv, one)
            target = e.at(a.address("d_query"),
                          e.mul(_query_line(e, a, b, h, q_start), i64(dim)), self.frame.word)
            e.call(self._store[dim], lines, i64(self.frame.line(dim)), rows,
                   self._late_scale(e, a), target)
        e.ret()
        return e.function

    def _by_rows(self, tile: Function) -> None:
        """by_rows(arguments). A unit is one tile of `heads_a_unit` query heads."""
        e = self.module.function("by_rows", ["ptr"], export=True)
        a = Arguments(e, e.params[0], ARGUMENTS)
        _, scratch = _scratch(e, a, "by_rows")
        heads = e.mul(a.get("kv_heads"), a.get("group"))
        with _units(e, a, "by_rows", "row") as (unit, gradients):
            tiles = e.mul(a.get("row_tiles"), _blocks(e, a, "row", a.get("q_len")))
            first = e.mul(e.op("sdiv", unit, tiles), a.get("heads_a_unit"))
            with e.loop(first, e.add(first, a.get("heads_a_unit"))) as one:
                e.call(tile, a.pointer, scratch, gradients, e.op("sdiv", one.index, heads),
                       e.op("srem", one.index, heads), e.op("srem", unit, tiles))
        e.ret()

    # Preparation

    def _prepare(self) -> None:
        """prepare(arguments): row_delta, and row_lse = -log2(e) lse (-inf for empty rows)."""
        e = self.module.function("prepare", ["ptr"], export=True)
        a = Arguments(e, e.params[0], ARGUMENTS)
        heads, q_len = e.mul(a.get("kv_heads"), a.get("group")), a.get("q_len")
        parts = e.op("sdiv", e.add(q_len, i64(PREPARED_ROWS - 1)), i64(PREPARED_ROWS))
        counter = _counter(e, a, "prepare", 0)
        with e.claim(counter, a.get("prepare_units")) as unit:
            head, part = e.op("sdiv", unit, parts), e.op("srem", unit, parts)
            b, h = e.op("sdiv", head, heads), e.op("srem", head, heads)
            first = e.mul(part, i64(PREPARED_ROWS))
            with e.loop(first, e.min(e.add(first, i64(PREPARED_ROWS)), q_len)) as row:
                self._prepare_row(e, a, b, h, row.index)
        e.ret()

    def _prepare_row(self, e: Emitter, a: Arguments, b: Value, h: Value, row: Value) -> None:
        frame, line = self.frame, _query_line(e, a, b, h, row)
        x, y = (e.at(a.address(t), a.offset(t, b=b, h=h, s=row), frame.word)
                for t in ("out", "d_out"))
        whole = frame.value_dim - frame.value_dim % e.lanes
        with e.loop(0, whole, e.lanes, [e.number(0.0)]) as d:
            d.next = [e.fma(e.load_as(frame.storage, x, d.index),
                            e.load_as(frame.storage, y, d.index), d.values[0])]
        with e.loop(whole, frame.value_dim, 1, [e.reduce(d.values[0], e.fadd)]) as d:
            d.next = [e.fma(e.load_as(frame.storage, x, d.index, scalar=True),
                            e.load_as(frame.storage, y, d.index, scalar=True), d.values[0])]
        delta, d_lse = d.values[0], a.address("d_lse")
        given = e.if_else(e.compare("ne", d_lse, NULL), lambda: [e.load(d_lse, e.real, line)],
                          lambda: [e.scalar(0.0)])
        e.store(e.fsub(delta, given[0]), a.address("row_delta"), line)
        lse = e.load(a.address("lse"), e.real, line)
        empty = e.compare("oeq", lse, e.scalar(-math.inf))
        scaled = e.fmul(lse, e.scalar(-LOG2_E))
        e.store(e.select(empty, e.scalar(-math.inf), scaled), a.address("row_lse"), line)


def _query_line(e: Emitter, a: Arguments, b: Value, h: Value, row: Value) -> Value:
    """Which row of a contiguous [batch, query head, q_len]."""
    heads = e.mul(a.get("kv_heads"), a.get("group"))
    return e.add(e.mul(e.add(e.mul(b, heads), h), a.get("q_len")), row)


def _blocks(e: Emitter, a: Arguments, table: str, length: Value) -> Value:
    block = a.get(f"{table}_block")
    return e.op("sdiv", e.add(length, e.sub(block, i64(1))), block)


def _tile(e: Emitter, a: Arguments, table: str, tile: Value,
          length: Value) -> tuple[Value, Value, Value]:
    """Row of the table of runs, first position, and number of positions of a tile, which lies
    within a block; none for the last tiles of a short block."""
    row, part = (e.op(op, tile, a.get(f"{table}_tiles")) for op in ("sdiv", "srem"))
    block, size = a.get(f"{table}_block"), a.get(f"{table}_tile")
    before = e.mul(part, size)
    start = e.add(e.mul(row, block), before)
    return row, start, e.min(e.min(size, e.sub(block, before)), e.sub(length, start))


def _counter(e: Emitter, a: Arguments, phase: str, which: int) -> Value:
    at = (2 * PHASES.index(phase) + which) * COUNTER_WORDS
    return e.at(a.address("counters"), at, "i64")


def _scratch(e: Emitter, a: Arguments, phase: str) -> tuple[Value, Value]:
    """Number and scratch memory of the thread that asks."""
    slot = e.atomic_add(_counter(e, a, phase, 1))
    return slot, e.at(a.address("scratch"), e.mul(slot, a.get("scratch_bytes")), "i8")


@contextmanager
def _units(e: Emitter, a: Arguments, phase: str,
           table: str) -> Iterator[tuple[Value, Value]]:
    """Units of lanes that no other thread has claimed, and the gradients a lane adds to."""
    lanes = a.get(f"{table}_lanes")
    with e.claim(_counter(e, a, phase, 0), lanes) as lane:
        words = e.mul(lane, a.get("gradient_words"))
        gradients = e.at(a.address("gradients"), words, "i64")
        with e.loop(lane, a.get(f"{table}_units"), lanes) as unit:
            yield unit.index, gradients
