"""Every interval rule alone: whatever an operation gives for values of its operands' intervals lies
in the interval its rule gives. Values are computed by torch; wrong rules are seen to be caught."""

from __future__ import annotations

import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexattn.analysis.bounds import Interval
from flexattn.analysis.interval_rules import TABLE
from flexattn.ir.evaluate import evaluate
from flexattn.ir.graph import Graph, node
from flexattn.ir.ops import (
    ARITHMETIC,
    BITWISE,
    COMPARISON,
    FLOAT_UNARY,
    FLOATS,
    INTEGERS,
    LEAVES,
    Op,
)

FLOAT_TYPES = sorted(FLOATS, key=str)
INTEGER_TYPES = sorted(INTEGERS, key=str)
NUMBERS = FLOAT_TYPES + INTEGER_TYPES
ALL = [*NUMBERS, torch.bool]
EXAMPLES = int(os.environ.get("FLEXATTN_TEST_EXAMPLES", 60))
SAMPLES = 12  # of each operand


def signatures():
    """(operation, types of its operands, type of its result)."""
    for op in (op for op in Op if op not in LEAVES):
        if op is Op.CAST:
            yield from ((op, (a,), b) for a in ALL for b in ALL)
        elif op is Op.WHERE:
            yield from ((op, (torch.bool, t, t), t) for t in ALL)
        elif op in FLOAT_UNARY:
            yield from ((op, (t,), t) for t in FLOAT_TYPES)
        elif op in (Op.NEG, Op.ABS, Op.SIGN):
            yield from ((op, (t,), t) for t in NUMBERS)
        elif op is Op.NOT:
            yield from ((op, (t,), t) for t in [*INTEGER_TYPES, torch.bool])
        elif op in ARITHMETIC:
            types = FLOAT_TYPES if op is Op.DIV else NUMBERS
            yield from ((op, (t, t), t) for t in types)
        elif op in BITWISE:
            types = INTEGER_TYPES + [torch.bool] * (op not in (Op.SHL, Op.SHR))
            yield from ((op, (t, t), t) for t in types)
        else:
            assert op in COMPARISON
            yield from ((op, (t, t), torch.bool) for t in ALL)


BY_OPERATION: dict[Op, list] = {}
for _op, _args, _result in signatures():
    BY_OPERATION.setdefault(_op, []).append((_args, _result))


@st.composite
def operands(draw, dtype):
    """(an Interval, values in it, both ends among them)."""
    if dtype is torch.bool:
        lo, hi = sorted(draw(st.tuples(st.booleans(), st.booleans())))
        return Interval(lo, hi), torch.tensor([lo, hi])
    if dtype in FLOATS:
        return draw(real_operands(dtype))
    info = torch.iinfo(dtype)
    near = st.integers(max(info.min, -70), min(info.max, 70))
    wide = st.integers(max(info.min, -(1 << 40)), min(info.max, 1 << 40))
    ends = st.one_of(st.tuples(near, near), st.tuples(wide, wide), near.map(lambda x: (x, x)),
                     st.tuples(near, st.integers(0, 9)).map(lambda p: (p[0], p[0] + p[1])))
    lo, hi = sorted(min(max(x, info.min), info.max) for x in draw(ends))
    inner = draw(st.lists(st.integers(lo, hi), max_size=SAMPLES))
    return Interval(lo, hi), torch.tensor([lo, hi, *inner], dtype=dtype)


@st.composite
def real_operands(draw, dtype):
    width = {torch.float64: 64, torch.float32: 32}.get(dtype, 16)
    top = 60000.0
    near = st.floats(-4, 4, width=min(width, 32) if width < 64 else 64)
    wide = st.floats(-top, top, width=width)
    end = st.one_of(near, wide, st.sampled_from([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf]))
    picked = [draw(end) for _ in range(2 + draw(st.integers(0, SAMPLES)))]
    values = torch.tensor(picked, dtype=torch.float64).to(dtype)
    lo, hi = values.double().min().item(), values.double().max().item()
    inside = [v for v in (0.0, 1.0, -1.0, 2.0) if lo <= v <= hi]
    if lo > -math.inf and hi < math.inf:
        inside += [lo + (hi - lo) * share for share in (0.1, 0.5, 0.77)]
    extra = torch.tensor(inside, dtype=torch.float64).to(dtype)
    extra = extra[(extra.double() >= lo) & (extra.double() <= hi)]
    nan = draw(st.booleans())
    more = torch.full((int(nan),), math.nan, dtype=dtype)
    return Interval(lo, hi, nan), torch.cat([values, extra, more])


def as_tensors(x: Interval, dtype: torch.dtype) -> Interval:
    """The same interval as one that holds for a batch of tiles."""
    kind = (torch.bool if dtype is torch.bool else torch.float64 if dtype in FLOATS
            else torch.int64)
    lo = torch.tensor([x.lo] * 2, dtype=kind)
    hi = lo if x.lo == x.hi and x.nan is False else torch.tensor([x.hi] * 2, dtype=kind)
    return Interval(lo, hi, torch.tensor([x.nan] * 2) if x.nan else False)


def check(op, types, result, drawn, batched, table=TABLE):
    """The rule of `op` holds for all combinations of the drawn values."""
    inputs = [node(Op.INPUT, dtype=t, attr=f"x{i}") for i, t in enumerate(types)]
    n = node(op, *inputs, dtype=result)
    grid = {f"x{i}": values.view([-1 if i == j else 1 for j in range(len(types))])
            for i, (_, values) in enumerate(drawn)}
    found = evaluate(Graph((("out", n),)), grid)["out"].flatten()
    got = table[op](n, *(x for x, _ in drawn))
    if result in INTEGERS:
        info = torch.iinfo(result)
        if got.lo < info.min or got.hi > info.max:
            return  # the caller sees that it may wrap
    if batched:
        got = table[op](n, *(as_tensors(x, t) for (x, _), t in zip(drawn, types, strict=True)))
    lo, hi, nan = (x[0].item() if isinstance(x, torch.Tensor) else x for x in got)
    what = (op.name, types, result, drawn, got)
    if result in FLOATS:
        assert nan or not found.isnan().any(), what
        found = found[~found.isnan()].double()
    if len(found):
        least, most = (x.item() for x in (found.int() if result is torch.bool else found).aminmax())
        assert lo <= least and most <= hi, (what, least, most)


@pytest.mark.parametrize("op", BY_OPERATION, ids=lambda op: op.name)
@settings(max_examples=EXAMPLES, deadline=None)
@given(data=st.data())
def test_rule_is_sound(op, data):
    types, result = data.draw(st.sampled_from(BY_OPERATION[op]))
    drawn = [data.draw(operands(t)) for t in types]
    check(op, types, result, drawn, data.draw(st.booleans()))


def test_every_operation_is_tested():
    assert set(BY_OPERATION) == set(TABLE)


@pytest.mark.parametrize("op, wrong", [
    (Op.SUB, lambda n, x, y: Interval(x.lo - y.lo, x.hi - y.hi)),
    (Op.LT, lambda n, x, y: Interval(x.hi <= y.lo, x.lo < y.hi)),
    (Op.LE, lambda n, x, y: Interval(x.hi <= y.lo, x.lo < y.hi)),
    (Op.EQ, lambda n, x, y: Interval(x.lo == y.lo, x.lo <= y.hi)),
    (Op.MOD, lambda n, x, y: Interval(x.lo % 7, x.hi % 7)),
    (Op.MUL, lambda n, x, y: Interval(x.lo * y.lo, x.hi * y.hi)),
    (Op.ABS, lambda n, x: Interval(abs(x.lo), abs(x.hi))),
    (Op.XOR, lambda n, x, y: Interval(min(x.lo, y.lo), max(x.hi, y.hi))),
    (Op.WHERE, lambda n, c, x, y: x),
    (Op.NOT, lambda n, x: x),
    (Op.TANH, lambda n, x: Interval(math.tanh(x.lo), math.tanh(x.hi), x.nan)),
    (Op.EXP, lambda n, x: Interval(0.0, math.exp(min(x.hi, 700.0)))),
], ids=lambda x: x.name if isinstance(x, Op) else "")
def test_a_wrong_rule_is_caught(op, wrong):
    @settings(max_examples=600, deadline=None, database=None)
    @given(data=st.data())
    def run(data):
        types, result = data.draw(st.sampled_from(BY_OPERATION[op]))
        check(op, types, result, [data.draw(operands(t)) for t in types], False,
              {op: wrong})

    with pytest.raises((AssertionError, ExceptionGroup)):
        run()
