"""Fused attention on a CPU: online softmax over packed keys and values, any mod, any mask.

In: the address of `ARGUMENTS`. Out: out, and lse (natural log) and max_scores where asked for.
`emit_forward` gives the IR of one function `forward(arguments)` that every thread of a team
calls once. Threads claim units of work by an atomic counter: packing of a few panels of keys and
values of a head, or one tile of queries; the units of a head's tiles come after its packing, and
wait for it. Packed heads lie in a ring of a few slots, which stay in the cache: packing waits for
the tiles of the head that had its slot before. Which thread takes which unit changes no result.

    for each tile of queries, for each run of its row of the block mask, for each tile of keys:
        s = q k^T                          scores, and score mod, and mask in partial blocks
        m' = max(m, max(s)); a = 2^(m - m'); p = 2^(s - m')
        l = l a + sum(p); o = o a + p v
    out = o / l; lse = ln 2 (m + log2 l)

Rejects nothing: flexattn.runtime.launch_cpu checks and prepares everything.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from flexattn.kernels.cpu_dsl import Emitter, Function, Module, Value, const, i64
from flexattn.kernels.cpu_frame import PLACE, Arguments, Frame, Place
from flexattn.kernels.cpu_pack import emit_pack
from flexattn.kernels.cpu_product import Left, Right, accumulators, multiply
from flexattn.kernels.cpu_rows import emit_start, emit_store, score_factor
from flexattn.kernels.cpu_sites import KernelMod
from flexattn.kernels.cpu_softmax import emit_attend, emit_attend_all, emit_softmax
from flexattn.kernels.cpu_stretch import cut_edges, emit_clip, emit_stretches, within_hull

ARGUMENTS = (
    # addresses
    "query", "key", "value", "out", "lse", "max_scores", "packed_key", "packed_value", "scratch",
    "counters", "score_captures", "score_numbers", "mask_captures", "mask_numbers",
    "score_fault", "mask_fault",
    "run_offsets", "run_start", "run_end", "run_full",
    # strides, in elements
    "query_b", "query_h", "query_s", "query_d", "key_b", "key_h", "key_s", "key_d",
    "value_b", "value_h", "value_s", "value_d", "out_b", "out_h", "out_s",
    # sizes
    "batches", "kv_batches", "kv_heads", "group", "q_len", "kv_len", "tile_rows", "tiles",
    "pack_units", "ring", "scratch_bytes",
    # block mask: its row of runs is b * runs_b + h * runs_h + (q_idx / row_block) * runs_q, and
    # has tiles_per_row tiles of tile_rows queries; one_run: all its runs are what the mask says
    "runs_b", "runs_h", "runs_q", "row_block", "col_block", "tiles_per_row", "one_run",
    # float64
    "scale",
)  # fmt: skip
PACK_PANELS = 16  # panels of keys and values packed in one unit of work
FLAG_WORDS = 8  # i64 words between counters, one cache line
GRAIN = 8  # keys: what the product of probabilities and values takes at once
COUNTER_WORDS = 2 * FLAG_WORDS  # next unit, next scratch; then two counters a kv head


class Forward:
    """The kernel for one dtype, head dimensions and pair of mods."""

    def __init__(self, frame: Frame, score: KernelMod | None = None,
                 mask: KernelMod | None = None) -> None:
        self.frame, self.score, self.mask = frame, score, mask
        self.module = Module(frame.tile.vector_bits, frame.storage)
        self.pack = emit_pack(self.module, frame.columns, frame.pairs)
        self.stretches = score is None and (mask is None or mask.is_stretch)

    def emit(self) -> str:
        """The whole module; exports `forward(arguments)` and `scratch_bytes() -> i64`."""
        pack_unit = self._pack_unit()
        scores, values, arrays = self._scores(), self._values(), [0]
        if self.stretches:
            self._stretches = emit_stretches(self.module, self.frame, ARGUMENTS, self.mask)
            block = self._block_of_stretches(scores, values)
        else:
            attend, *arrays = emit_attend(self.module, self.frame, ARGUMENTS, self.mask, GRAIN)
            softmax = []
            for masked in (False, True):
                function, count = emit_softmax(self.module, self.frame, ARGUMENTS, self.score,
                                               masked)
                softmax.append(function)
                arrays.append(count)
            block = self._block(attend, softmax, scores, values)
        start = emit_start(self.module, self.frame, ARGUMENTS, self.score is not None)
        store = emit_store(self.module, self.frame, ARGUMENTS)
        self._forward(pack_unit, self._tile(start, block, store))
        e = self.module.function("scratch_bytes", [], result="i64", export=True)
        e.ret(i64(self.frame.bytes(max(arrays))))
        return str(self.module)

    # Packing

    def _pack_unit(self) -> Function:
        """pack_unit(arguments, kv batch, kv head, first panel): PACK_PANELS panels of keys, and
        the values of the same keys."""
        e = self.module.function("pack_unit", ["ptr", "i64", "i64", "i64"])
        a, columns = Arguments(e, e.params[0], ARGUMENTS), i64(self.frame.columns)
        b, h, first = e.params[1:]
        kv_len = a.get("kv_len")
        last = e.min(e.add(first, i64(PACK_PANELS)), self._panels(e, kv_len))
        slot = self._slot(e, a, e.add(e.mul(b, a.get("kv_heads")), h))
        key, value = (e.at(a.address(name), a.offset(name, b=b, h=h), self.frame.word)
                      for name in ("key", "value"))
        key_stride, key_stride_d = a.get("key_s"), a.get("key_d")
        stride, stride_d = a.get("value_s"), a.get("value_d")
        with e.loop(first, last) as panel:
            start = e.mul(panel.index, columns)
            keys = e.min(e.sub(kv_len, start), columns)
            e.call(self.pack, e.at(key, e.mul(start, key_stride), self.frame.word), key_stride,
                   key_stride_d, keys, i64(self.frame.head_dim),
                   i64(self.frame.depth(self.frame.head_dim)),
                   self._packed_key(e, a, slot, start))
            line = e.at(value, e.mul(start, stride), self.frame.word)
            with e.loop(0, self.frame.value_panels) as part:
                d = e.mul(part.index, columns)
                e.call(self.pack, e.at(line, e.mul(d, stride_d), self.frame.word), stride_d,
                       stride, e.min(e.sub(i64(self.frame.value_dim), d), columns), keys, columns,
                       self._packed_value(e, a, slot, part.index, start))
        e.ret()
        return e.function

    def _panels(self, e: Emitter, keys: Value) -> Value:
        return e.op("sdiv", e.add(keys, i64(self.frame.columns - 1)), i64(self.frame.columns))

    def _slot(self, e: Emitter, a: Arguments, head: Value) -> Value:
        """Where in the ring a head is packed."""
        return e.op("srem", head, a.get("ring"))

    def _packed_key(self, e: Emitter, a: Arguments, head: Value, key: Value) -> Value:
        """Packed keys of a head from a panel's first key on, [panel][depth][columns]."""
        keys = e.mul(self._panels(e, a.get("kv_len")), i64(self.frame.columns))
        line = i64(self.frame.depth(self.frame.head_dim))
        at = e.mul(e.add(e.mul(head, keys), key), line)
        return e.at(a.address("packed_key"), at, self.frame.word)

    def _packed_value(self, e: Emitter, a: Arguments, head: Value, panel: Value,
                      key: Value) -> Value:
        """Packed values of a head from a key on, [panel][key][columns]."""
        keys = e.mul(self._panels(e, a.get("kv_len")), i64(self.frame.columns))
        line = e.add(e.mul(e.add(e.mul(head, i64(self.frame.value_panels)), panel), keys), key)
        at = e.mul(line, i64(self.frame.columns))
        return e.at(a.address("packed_value"), at, self.frame.word)

    # One tile of queries and one of keys

    def _scores(self) -> Function:
        """scores(scratch, packed keys, rows, width, factor): s = q k^T where any row is attended,
        times the factor where q was not scaled."""
        e = self.module.function("scores", ["ptr", "ptr", "i64", "i64", self.module.real])
        scratch, key, rows, width, factor = e.params
        depth, stride = self.frame.words(self.frame.head_dim), self.frame.score_stride
        line, factors = self.frame.depth(self.frame.head_dim), e.splat(factor)
        q, s, first, last = (self.frame.array(e, scratch, n)
                             for n in ("query", "scores", "first", "last"))
        with e.loop(0, width, self.frame.columns) as column:
            panel = e.at(key, e.mul(column.index, i64(line)), self.frame.word)

            def product(row: Value, count: int) -> None:
                end = e.add(column.index, i64(self.frame.columns))
                after_first = e.compare("slt", e.load(first, "i64", row), end)
                before_last = e.compare("slt", column.index, e.load(last, "i64", row))
                with e.if_(e.and_(after_first, before_last)):
                    acc = multiply(e, accumulators(e, count, self.frame.tile.vectors),
                                   Left(e.at(q, e.mul(row, i64(depth)), e.real), depth),
                                   Right(panel, self.frame.columns, self.frame.packed), depth)
                    if self.frame.pairs:
                        acc = [[e.fmul(x, factors) for x in xs] for xs in acc]
                    at = e.at(s, e.add(e.mul(row, i64(stride)), column.index), e.real)
                    for i, xs in enumerate(acc):
                        for j, x in enumerate(xs):
                            e.store(x, at, i * stride + j * e.lanes)
                    if self.stretches:
                        cut_edges(e, self.frame, scratch, (row, count), column.index, at)

            self.frame.row_panels(e, rows, product)
        e.ret()
        return e.function

    def _values(self) -> Function:
        """values(scratch, packed values, keys of a packed panel, rows): o = rescale o + p v."""
        e = self.module.function("values", ["ptr", "ptr", "i64", "i64"])
        scratch, value, keys, rows = e.params
        stride, columns = self.frame.score_stride, self.frame.columns
        p, o, rescale, first, last = (self.frame.array(e, scratch, n) for n in
                                      ("scores", "out", "rescale", "first", "last"))
        with e.loop(0, self.frame.value_panels) as panel:
            v = e.at(value, e.mul(panel.index, e.mul(keys, i64(columns))), self.frame.word)
            o_panel = e.at(o, e.mul(panel.index, i64(self.frame.out_panel)), e.real)

            def product(row: Value, count: int) -> None:
                at = e.at(o_panel, e.mul(row, i64(columns)), e.real)
                factors, acc = e.at(rescale, row, e.real), []
                for i in range(count):
                    factor = e.splat(e.load(factors, e.real, i))
                    acc.append([e.fmul(factor, e.load(at, e.vector, i * columns + j * e.lanes))
                                for j in range(self.frame.tile.vectors)])
                start = e.load(first, "i64", row)
                depth = e.max(e.sub(e.load(last, "i64", row), start), i64(0))
                begin, depth = (self.frame.in_words(e, x) for x in (start, depth))
                left = Left(e.at(p, e.add(e.mul(row, i64(stride)), begin), e.real), stride)
                right = Right(e.at(v, e.mul(start, i64(columns)), self.frame.word), columns,
                              self.frame.packed)
                for i, line in enumerate(multiply(e, acc, left, right, depth)):
                    for j, x in enumerate(line):
                        e.store(x, at, i * columns + j * e.lanes)

            self.frame.row_panels(e, rows, product)
        e.ret()
        return e.function

    def _block(self, attend: Function, softmax: Sequence[Function], scores: Function,
               values: Function) -> Function:
        """block(arguments, scratch, place..., packed head, whole): one step of the recurrence."""
        e = self.module.function("block", ["ptr", "ptr", *PLACE, "i64", "i1"])
        a, scratch = Arguments(e, e.params[0], ARGUMENTS), e.params[1]
        *where, head, whole = e.params[2:]
        place = Place(*where)
        full = place.is_whole(e)
        if self.mask is not None:
            full = e.and_(full, whole)
        partial = e.op("xor", full, const("i1", True))
        with e.if_(partial):
            e.call(attend, a.pointer, scratch, *where, whole)
        with e.if_(full):
            e.call(emit_attend_all(self.module, self.frame), scratch, place.width)
        e.call(scores, scratch, self._packed_key(e, a, head, place.kv_start), place.rows,
               place.width, score_factor(e, a, self.score is not None))
        for condition, function in ((full, softmax[0]), (partial, softmax[1])):
            with e.if_(condition):
                e.call(function, a.pointer, scratch, *where)
        e.call(values, scratch, self._packed_value(e, a, head, i64(0), place.kv_start),
               e.mul(self._panels(e, a.get("kv_len")), i64(self.frame.columns)), place.rows)
        e.ret()
        return e.function

    def _block_of_stretches(self, scores: Function, values: Function) -> Function:
        """The same where rows attend stretches."""
        clip = emit_clip(self.module, self.frame, GRAIN)
        softmax, _ = emit_softmax(self.module, self.frame, ARGUMENTS, None, False)
        e = self.module.function("block", ["ptr", "ptr", *PLACE, "i64", "i1"])
        a, scratch = Arguments(e, e.params[0], ARGUMENTS), e.params[1]
        *where, head, whole = e.params[2:]
        place = Place(*where)
        e.call(clip, scratch, place.rows, place.kv_start, place.skip, place.count, place.width,
               whole)
        e.call(scores, scratch, self._packed_key(e, a, head, place.kv_start), place.rows,
               place.width, score_factor(e, a, False))
        e.call(softmax, a.pointer, scratch, *where)
        e.call(values, scratch, self._packed_value(e, a, head, i64(0), place.kv_start),
               e.mul(self._panels(e, a.get("kv_len")), i64(self.frame.columns)), place.rows)
        e.ret()
        return e.function

    # One tile of queries

    def _tile(self, start: Function, block: Function, store: Function) -> Function:
        """tile(arguments, scratch, b, h, packed head, tile)."""
        e = self.module.function("tile", ["ptr", "ptr", "i64", "i64", "i64", "i64"])
        a, scratch = Arguments(e, e.params[0], ARGUMENTS), e.params[1]
        b, h, head, tile = e.params[2:]
        row, part = (e.op(op, tile, a.get("tiles_per_row")) for op in ("sdiv", "srem"))
        before = e.mul(part, a.get("tile_rows"))
        q_start = e.add(e.mul(row, a.get("row_block")), before)
        rows = e.min(e.min(a.get("tile_rows"), e.sub(a.get("row_block"), before)),
                     e.sub(a.get("q_len"), q_start))
        with e.if_(e.compare("sgt", rows, i64(0))):
            self._attend(e, a, scratch, (b, h, q_start, rows), head, row, (start, block, store))
        e.ret()
        return e.function

    def _attend(self, e: Emitter, a: Arguments, scratch: Value, queries: tuple[Value, ...],
                head: Value, row: Value, parts: tuple[Function, ...]) -> None:
        """All keys of a tile of queries (b, h, q_start, rows), from its row of runs; from the
        first one's start to the last one's end where the mask alone says what is attended."""
        start, block, store = parts
        e.call(start, a.pointer, scratch, *queries)
        line = a.offset("runs", b=queries[0], h=queries[1], q=row)

        def entry(name: str, index: Value) -> Value:
            return e.cast("sext", e.load(a.address(name), "i32", index), "i64")

        first, last = entry("run_offsets", line), entry("run_offsets", e.add(line, i64(1)))
        joined = const("i1", False)
        if self.stretches:
            joined = e.compare("ne", a.get("one_run"), i64(0))
            e.call(self._stretches, a.pointer, scratch, *queries)
        final = e.sub(last, i64(1))
        with e.loop(first, e.select(joined, e.min(last, e.add(first, i64(1))), last)) as run:
            begin = e.mul(entry("run_start", run.index), a.get("col_block"))
            end = e.mul(entry("run_end", e.select(joined, final, run.index)), a.get("col_block"))
            end = e.min(end, a.get("kv_len"))
            whole = e.compare("ne", e.load(a.address("run_full"), "i8", run.index), const("i8", 0))
            if self.stretches:
                whole = e.and_(whole, e.op("xor", joined, const("i1", True)))
                begin, end = within_hull(e, self.frame, scratch, begin, end, whole)
            aligned = e.and_(begin, i64(-self.frame.columns))
            with e.loop(aligned, end, self.frame.tile.tile_kv) as kv:
                skip = e.max(e.sub(begin, kv.index), i64(0))
                count = e.min(i64(self.frame.tile.tile_kv), e.sub(end, kv.index))
                width = e.mul(self._panels(e, count), i64(self.frame.columns))
                e.call(block, a.pointer, scratch, *queries, kv.index, skip, count, width, head,
                       whole)
        e.call(store, a.pointer, scratch, *queries)

    # The team's work

    def _forward(self, pack_unit: Function, tile: Function) -> None:
        """What each thread runs: claim units until none is left. For each head in turn: packing
        of the head, tiles of the one before it."""
        e = self.module.function("forward", ["ptr"], export=True)
        a = Arguments(e, e.params[0], ARGUMENTS)
        counters, packs, kv_heads = a.address("counters"), a.get("pack_units"), a.get("kv_heads")
        slot = e.atomic_add(e.at(counters, FLAG_WORDS, "i64"))
        scratch = e.at(a.address("scratch"), e.mul(slot, a.get("scratch_bytes")), "i8")
        heads = e.mul(a.get("kv_batches"), kv_heads)
        shared = e.op("sdiv", a.get("batches"), a.get("kv_batches"))  # batches of one key batch
        repeats = e.mul(shared, a.get("group"))
        period = e.add(packs, e.mul(a.get("tiles"), repeats))
        units = e.mul(e.add(heads, i64(1)), period)
        with e.claim(counters, units) as unit:
            head, rest = e.op("sdiv", unit, period), e.op("srem", unit, period)
            packing = e.compare("slt", rest, packs)
            before = e.sub(head, i64(1))
            with e.if_(e.and_(packing, e.compare("slt", head, heads))):
                earlier = e.sub(head, a.get("ring"))
                with e.if_(e.compare("sge", earlier, i64(0))):
                    self._wait(e, self._done(e, counters, earlier), e.sub(period, packs))
                first = e.mul(rest, i64(PACK_PANELS))
                e.call(pack_unit, a.pointer, e.op("sdiv", head, kv_heads),
                       e.op("srem", head, kv_heads), first)
                e.atomic_add(self._packed(e, counters, head))
            with e.if_(e.compare("sgt", e.select(packing, i64(0), head), i64(0))):
                self._wait(e, self._packed(e, counters, before), packs)
                at = e.sub(rest, packs)
                repeat = e.op("srem", at, repeats)
                b = e.add(e.op("sdiv", before, kv_heads), e.op("sdiv", repeat, a.get("group")))
                h = e.add(e.mul(e.op("srem", before, kv_heads), a.get("group")),
                          e.op("srem", repeat, a.get("group")))
                index = e.sub(e.sub(a.get("tiles"), i64(1)), e.op("sdiv", at, repeats))
                e.call(tile, a.pointer, scratch, b, h, self._slot(e, a, before), index)
                e.atomic_add(self._done(e, counters, before))
        e.ret()

    def _packed(self, e: Emitter, counters: Value, head: Value) -> Value:
        """Counter of a head's finished packing units."""
        return e.at(counters, e.add(i64(COUNTER_WORDS), e.mul(head, i64(FLAG_WORDS))), "i64")

    def _done(self, e: Emitter, counters: Value, head: Value) -> Value:
        """Counter of a head's finished tiles."""
        return e.at(self._packed(e, counters, head), 1, "i64")

    def _wait(self, e: Emitter, counter: Value, count: Value) -> None:
        give_way = e.module.declare("SwitchToThread" if sys.platform == "win32" else "sched_yield",
                                    "i32", [])
        with e.while_(lambda: e.compare("slt", e.atomic_load(counter), count)):
            e.call(give_way)
