"""Attention of a few queries to many keys on a CPU: reads keys and values once, where they lie.

In: the address of `ARGUMENTS`; head dimensions must be contiguous and whole vectors. Out: what
cpu_forward.py gives. Each unit of work is a stretch of the keys of one key head for all queries
that share it (or of one query head, where heads have masks of their own). Where a head's keys are
split, its units leave their partial sums in memory and the last one to finish merges them in
order, so that which thread takes which unit changes no result.
"""

from __future__ import annotations

from collections.abc import Sequence

from flexattn.kernels.cpu_dsl import Emitter, Function, Module, Value, const, i64
from flexattn.kernels.cpu_frame import PLACE, Arguments, Frame, Place
from flexattn.kernels.cpu_rows import emit_start, emit_store
from flexattn.kernels.cpu_sites import KernelMod
from flexattn.kernels.cpu_softmax import emit_attend, emit_attend_all, emit_softmax

ARGUMENTS = (
    # addresses
    "query", "key", "value", "out", "lse", "max_scores", "partials", "scratch", "counters",
    "score_captures", "score_numbers", "mask_captures", "mask_numbers",
    "score_fault", "mask_fault",
    "run_offsets", "run_start", "run_end", "run_full",
    # strides, in elements
    "query_b", "query_h", "query_s", "query_d", "key_b", "key_h", "key_s",
    "value_b", "value_h", "value_s", "out_b", "out_h", "out_s",
    # sizes; heads_per_unit query heads share a unit, of whose keys there are `splits` stretches
    "batches", "kv_batches", "kv_heads", "group", "q_len", "kv_len",
    "heads_per_unit", "splits", "keys_per_split", "scratch_bytes",
    # block mask: its row of runs is b * runs_b + h * runs_h
    "runs_b", "runs_h", "col_block",
    # float64
    "scale",
)  # fmt: skip
FLAG_WORDS = 8  # i64 words between counters, one cache line
COUNTER_WORDS = 2 * FLAG_WORDS  # next unit, next scratch; then finished splits of each head
KEYS_IN_CACHE = 32  # values are read in stretches that stay in the first-level cache
STATE = ("maximum", "total", "out")  # what a split leaves for the merge


class Decode:
    """The kernel for one dtype, head dimensions and pair of mods. A unit's query heads have a
    scratch memory each, one after the other."""

    def __init__(self, frame: Frame, score: KernelMod | None = None,
                 mask: KernelMod | None = None) -> None:
        self.frame, self.score, self.mask = frame, score, mask
        self.module = Module(frame.tile.vector_bits, frame.storage)

    def emit(self) -> str:
        """The whole module; exports `decode(arguments)`, `scratch_bytes() -> i64` (of one head)
        and `partial_bytes() -> i64` (of one head of one split)."""
        attend, *arrays = emit_attend(self.module, self.frame, ARGUMENTS, self.mask)
        softmax = []
        for masked in (False, True):
            function, count = emit_softmax(self.module, self.frame, ARGUMENTS, self.score, masked)
            softmax.append(function)
            arrays.append(count)
        block = self._block(attend, softmax, self._scores(), self._values())
        start = emit_start(self.module, self.frame, ARGUMENTS, self.score is not None)
        store = emit_store(self.module, self.frame, ARGUMENTS)
        self._decode(self._stretch(start, block), store)
        for name, size in (("scratch_bytes", self.frame.bytes(max(arrays))),
                           ("partial_bytes", self.frame.state_bytes(STATE))):
            e = self.module.function(name, [], result="i64", export=True)
            e.ret(i64(size))
        return str(self.module)

    # One tile of keys

    def _scores(self) -> Function:
        """scores(scratch, keys, stride, rows, count, width): s = q k^T, one vector of keys at a
        time; columns from count on repeat the last key."""
        e = self.module.function("scores", ["ptr", "ptr", "i64", "i64", "i64", "i64"])
        scratch, keys, stride, rows, count, width = e.params
        q, s, first, last = (self.frame.array(e, scratch, n)
                             for n in ("query", "scores", "first", "last"))
        end = e.sub(count, i64(1))
        with e.loop(0, width, e.lanes) as column:
            at = [e.mul(e.min(e.add(column.index, i64(i)), end), stride) for i in range(e.lanes)]
            key = [e.at(keys, x, self.frame.word) for x in at]
            with e.loop(0, rows) as row:
                after_first = e.compare("sle", e.load(first, "i64", row.index), column.index)
                before_last = e.compare("slt", column.index, e.load(last, "i64", row.index))
                with e.if_(e.and_(after_first, before_last)):
                    line = e.at(q, e.mul(row.index, i64(self.frame.head_dim)), e.real)
                    with e.loop(0, self.frame.head_dim, e.lanes,
                                [e.number(0.0)] * e.lanes) as d:
                        x = e.load(line, e.vector, d.index)
                        d.next = [e.fma(x, e.load_as(self.frame.storage, k, d.index), total)
                                  for k, total in zip(key, d.values, strict=True)]
                    target = e.mul(row.index, i64(self.frame.score_stride))
                    e.store(sum_each(e, d.values), s, e.add(target, column.index))
        e.ret()
        return e.function

    def _values(self) -> Function:
        """values(scratch, values, stride, rows, count): o = rescale o + p v."""
        e = self.module.function("values", ["ptr", "ptr", "i64", "i64", "i64"])
        scratch, values, stride, rows, count = e.params
        p, o, rescale, first, last = (self.frame.array(e, scratch, n) for n in
                                      ("scores", "out", "rescale", "first", "last"))
        with e.loop(0, rows) as row:
            factor = e.splat(e.load(rescale, e.real, row.index))
            for d in range(0, self.frame.value_dim, e.lanes):
                at = e.at(o, e.add(self._place(e, row.index), i64(self._out(d))), e.real)
                e.store(e.fmul(e.load(at, e.vector), factor), at)
        with e.loop(0, count, KEYS_IN_CACHE) as stretch, e.loop(0, rows) as row:
            line = e.at(p, e.mul(row.index, i64(self.frame.score_stride)), e.real)
            start = e.max(stretch.index, e.load(first, "i64", row.index))
            end = e.min(e.min(e.add(stretch.index, i64(KEYS_IN_CACHE)), count),
                        e.load(last, "i64", row.index))
            o_row = e.at(o, self._place(e, row.index), e.real)
            for d in range(0, self.frame.value_dim, 8 * e.lanes):
                parts = range(d, min(d + 8 * e.lanes, self.frame.value_dim), e.lanes)
                old = [e.load(o_row, e.vector, self._out(part)) for part in parts]
                with e.loop(start, end, 1, old) as key:
                    weight = e.splat(e.load(line, e.real, key.index))
                    v = e.at(values, e.mul(key.index, stride), self.frame.word)
                    key.next = [e.fma(weight, e.load_as(self.frame.storage, v, part), total)
                                for part, total in zip(parts, key.values, strict=True)]
                for part, total in zip(parts, key.values, strict=True):
                    e.store(total, o_row, self._out(part))
        e.ret()
        return e.function

    def _place(self, e: Emitter, row: Value) -> Value:
        return e.mul(row, i64(self.frame.columns))

    def _out(self, d: int) -> int:
        """Where dimension d of the first row lies in the scratch's output."""
        return d // self.frame.columns * self.frame.out_panel + d % self.frame.columns

    def _block(self, attend: Function, softmax: Sequence[Function], scores: Function,
               values: Function) -> Function:
        """block(arguments, scratch, place..., keys, values, whole): one step of the recurrence
        for one query head."""
        e = self.module.function("block", ["ptr", "ptr", *PLACE, "ptr", "ptr", "i1"])
        a, scratch = Arguments(e, e.params[0], ARGUMENTS), e.params[1]
        *where, keys, values_at, whole = e.params[2:]
        place = Place(*where)
        full = place.is_whole(e)
        if self.mask is not None:
            full = e.and_(full, whole)
        partial = e.op("xor", full, const("i1", True))
        with e.if_(partial):
            e.call(attend, a.pointer, scratch, *where, whole)
        with e.if_(full):
            e.call(emit_attend_all(self.module, self.frame), scratch, place.width)
        e.call(scores, scratch, keys, a.get("key_s"), place.rows, place.count, place.width)
        for condition, function in ((full, softmax[0]), (partial, softmax[1])):
            with e.if_(condition):
                e.call(function, a.pointer, scratch, *where)
        e.call(values, scratch, values_at, a.get("value_s"), place.rows, place.count)
        e.ret()
        return e.function

    # One stretch of keys

    def _stretch(self, start: Function, block: Function) -> Function:
        """stretch(arguments, scratch, b, first head, first key, last key)."""
        e = self.module.function("stretch", ["ptr", "ptr", "i64", "i64", "i64", "i64"])
        a, scratch = Arguments(e, e.params[0], ARGUMENTS), e.params[1]
        b, h, low, high = e.params[2:]
        q_len, zero = a.get("q_len"), i64(0)
        with e.loop(0, a.get("heads_per_unit")) as head:
            e.call(start, a.pointer, self._scratch(e, a, scratch, head.index), b,
                   e.add(h, head.index), zero, q_len)
        kv_h, kv_b = e.op("sdiv", h, a.get("group")), e.min(b, e.sub(a.get("kv_batches"), i64(1)))
        key = e.at(a.address("key"), a.offset("key", b=kv_b, h=kv_h), self.frame.word)
        value = e.at(a.address("value"), a.offset("value", b=kv_b, h=kv_h), self.frame.word)
        line = a.offset("runs", b=b, h=h)

        def entry(name: str, index: Value) -> Value:
            return e.cast("sext", e.load(a.address(name), "i32", index), "i64")

        first, last = entry("run_offsets", line), entry("run_offsets", e.add(line, i64(1)))
        with e.loop(first, last) as run:
            begin = e.max(e.mul(entry("run_start", run.index), a.get("col_block")), low)
            end = e.min(e.mul(entry("run_end", run.index), a.get("col_block")), high)
            whole = e.compare("ne", e.load(a.address("run_full"), "i8", run.index), const("i8", 0))
            with e.loop(begin, end, self.frame.tile.tile_kv) as kv:
                count = e.min(i64(self.frame.tile.tile_kv), e.sub(end, kv.index))
                width = e.and_(e.add(count, i64(self.frame.columns - 1)), i64(-self.frame.columns))
                keys = e.at(key, e.mul(kv.index, a.get("key_s")), self.frame.word)
                values = e.at(value, e.mul(kv.index, a.get("value_s")), self.frame.word)
                with e.loop(0, a.get("heads_per_unit")) as head:
                    e.call(block, a.pointer, self._scratch(e, a, scratch, head.index), b,
                           e.add(h, head.index), zero, q_len, kv.index, zero, count, width, keys,
                           values, whole)
        e.ret()
        return e.function

    def _scratch(self, e: Emitter, a: Arguments, scratch: Value, head: Value) -> Value:
        return e.at(scratch, e.mul(head, a.get("scratch_bytes")), "i8")

    # The team's work

    def _decode(self, stretch: Function, store: Function) -> None:
        """What each thread runs: claim units until none is left."""
        merge = self._merge()
        e = self.module.function("decode", ["ptr"], export=True)
        a = Arguments(e, e.params[0], ARGUMENTS)
        counters, splits, per_unit = a.address("counters"), a.get("splits"), a.get("heads_per_unit")
        slot = e.atomic_add(e.at(counters, FLAG_WORDS, "i64"))
        own = e.mul(e.mul(slot, per_unit), a.get("scratch_bytes"))
        scratch = e.at(a.address("scratch"), own, "i8")
        stacks = e.op("sdiv", e.mul(a.get("kv_heads"), a.get("group")), per_unit)
        units = e.mul(e.mul(a.get("batches"), stacks), splits)
        with e.claim(counters, units) as unit:
            split, stack = e.op("srem", unit, splits), e.op("sdiv", unit, splits)
            b, h = e.op("sdiv", stack, stacks), e.mul(e.op("srem", stack, stacks), per_unit)
            low = e.mul(split, a.get("keys_per_split"))
            high = e.min(e.add(low, a.get("keys_per_split")), a.get("kv_len"))
            e.call(stretch, a.pointer, scratch, b, h, low, high)
            alone = e.compare("eq", splits, i64(1))
            with e.if_(e.op("xor", alone, const("i1", True))), \
                    e.loop(0, per_unit) as head:
                place = e.add(e.mul(unit, per_unit), head.index)
                self._copy_state(e, self._scratch(e, a, scratch, head.index),
                                 self._partial(e, a, place))
            done = e.at(counters, e.add(i64(COUNTER_WORDS), e.mul(stack, i64(FLAG_WORDS))), "i64")
            before = e.atomic_add(done)
            with e.if_(e.compare("eq", before, e.sub(splits, i64(1)))), \
                    e.loop(0, per_unit) as head:
                own = self._scratch(e, a, scratch, head.index)
                place = e.add(e.mul(e.mul(stack, splits), per_unit), head.index)
                with e.if_(e.op("xor", alone, const("i1", True))):
                    e.call(merge, self._partial(e, a, place),
                           e.mul(per_unit, i64(self.frame.state_bytes(STATE))), splits, own,
                           a.get("q_len"))
                e.call(store, a.pointer, own, b, e.add(h, head.index), i64(0), a.get("q_len"))
        e.ret()

    def _partial(self, e: Emitter, a: Arguments, place: Value) -> Value:
        return e.at(a.address("partials"), e.mul(place, i64(self.frame.state_bytes(STATE))), "i8")

    def _copy_state(self, e: Emitter, scratch: Value, partial: Value) -> None:
        for name in STATE:
            source = self.frame.array(e, scratch, name)
            target = self.frame.array(e, partial, name, STATE)
            with e.loop(0, self.frame.elements(name), e.lanes) as at:
                e.store(e.load(source, e.vector, at.index), target, at.index)

    def _merge(self) -> Function:
        """merge(first partial, bytes to the next, splits, scratch, rows): the state of a head's
        splits as if its keys had not been split."""
        e = self.module.function("merge", ["ptr", "i64", "i64", "ptr", "i64"])
        partials, step, splits, scratch, rows = e.params
        maximum, total, out, factor = (self.frame.array(e, scratch, n)
                                       for n in (*STATE, "rescale"))
        self._copy_state_back(e, partials, scratch)
        with e.loop(1, splits) as split:
            part = e.at(partials, e.mul(split.index, step), "i8")
            its_maximum, its_total, its_out = (self.frame.array(e, part, n, STATE) for n in STATE)
            with e.loop(0, self.frame.tile.tile_q, e.lanes) as row:
                old, new = (e.load_to_change(m, e.vector, row.index)
                            for m in (maximum, its_maximum))
                largest = e.max(new, old)
                nothing = e.compare("oeq", largest, e.number(float("-inf")))
                base = e.select(nothing, e.number(0.0), largest)
                factors = [e.exp2(e.fsub(x, base)) for x in (old, new)]
                sums = [e.load(x, e.vector, row.index) for x in (total, its_total)]
                e.store(largest, maximum, row.index)
                e.store(e.fma(sums[0], factors[0], e.fmul(sums[1], factors[1])), total, row.index)
                e.store(factors[0], factor, row.index)
                e.store(factors[1], its_maximum, row.index)
            with e.loop(0, rows) as row:
                ours = e.splat(e.load(factor, e.real, row.index))
                theirs = e.splat(e.load(its_maximum, e.real, row.index))
                at = self._place(e, row.index)
                for d in range(0, self.frame.value_dim, e.lanes):
                    here = e.add(at, i64(self._out(d)))
                    scaled = e.fmul(e.load(its_out, e.vector, here), theirs)
                    e.store(e.fma(e.load(out, e.vector, here), ours, scaled), out, here)
        e.ret()
        return e.function

    def _copy_state_back(self, e: Emitter, partial: Value, scratch: Value) -> None:
        for name in STATE:
            source = self.frame.array(e, partial, name, STATE)
            target = self.frame.array(e, scratch, name)
            with e.loop(0, self.frame.elements(name), e.lanes) as at:
                e.store(e.load(source, e.vector, at.index), target, at.index)


def sum_each(e: Emitter, vectors: Sequence[Value]) -> Value:
    """Lane i is the sum of the lanes of vectors[i], for as many vectors as lanes."""
    n, size = len(vectors), 1
    while len(vectors) > 1:
        low = [i if not i & size else i - size + n for i in range(n)]
        high = [i + size if not i & size else i + n for i in range(n)]
        vectors = [e.fadd(e.shuffle(x, y, low), e.shuffle(x, y, high))
                   for x, y in zip(vectors[::2], vectors[1::2], strict=True)]
        size *= 2
    return vectors[0]
