"""The interval of each operation from the intervals of its operands: one table.

In: a node and an Interval for each argument. Out: an Interval that holds every value the operation
can take, as `analysis.interval_numbers` has it for arithmetic; here are bits, truth values,
comparisons and conversions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flexattn.analysis.bounds import (
    Bound,
    Interval,
    as_dtype,
    both,
    choose,
    either,
    integer_range,
    is_number,
    negate,
    unbounded,
)
from flexattn.analysis.interval_numbers import (
    Rule,
    absolute,
    add,
    any_nan,
    corners,
    divide,
    floor_divide,
    greatest,
    hull,
    least,
    monotone,
    multiply,
    negative,
    number_of,
    periodic,
    power,
    remainder,
    rsqrt,
    sign_of,
    stepped,
    subtract,
    wave,
)
from flexattn.ir.graph import Node
from flexattn.ir.ops import FLOATS, Op

# Bits


def _not(n: Node, x: Interval) -> Interval:
    if n.dtype is torch.bool:
        return Interval(negate(x.hi), negate(x.lo))
    top = 255 if n.dtype is torch.uint8 else -1
    return Interval(top - x.hi, top - x.lo)


def _bitwise(logical: Rule, known: Callable[[Bound, Bound], Bound]) -> Rule:
    """Of integers: bits above the highest one that differs within an operand are known."""
    def rule(n: Node, x: Interval, y: Interval) -> Interval:
        if n.dtype is torch.bool:
            return logical(n, x, y)
        (x_ones, x_maybe), (y_ones, y_maybe) = _bits(x), _bits(y)
        return _signed(known(x_ones, y_ones), known(x_maybe, y_maybe), n.dtype)

    return rule


def _bits(x: Interval) -> tuple[Bound, Bound]:
    """(bits that are always one, bits that are one somewhere)."""
    unknown = _smear(x.lo ^ x.hi)
    return x.lo & ~unknown, x.lo | unknown


def _smear(x: Bound) -> Bound:
    """All bits at and below the highest one; all bits of a negative number."""
    if is_number(x):
        return -1 if x < 0 else (1 << x.bit_length()) - 1
    for shift in (1, 2, 4, 8, 16, 32):
        x = x | (x >> shift)
    return x


def _signed(ones: Bound, maybe: Bound, dtype: torch.dtype) -> Interval:
    """Bounds of numbers with these bits; two's complement, the sign extended."""
    if dtype is torch.uint8:
        return Interval(ones, maybe)
    lowest, highest = integer_range(dtype)[:2]
    return Interval(choose(maybe < 0, ones | lowest, ones),
                    choose(ones < 0, maybe, maybe & highest))


def _and(n: Node, x: Interval, y: Interval) -> Interval:
    if n.dtype is torch.bool:
        return Interval(both(x.lo, y.lo), both(x.hi, y.hi))
    c = number_of(y)
    if c is not None and c > 0 and int(c) & (int(c) + 1) == 0:
        return periodic(x, int(c) + 1)
    return _AND_BITS(n, x, y)


def _xor(n: Node, x: Interval, y: Interval) -> Interval:
    if n.dtype is torch.bool:
        return Interval(either(both(x.lo, negate(y.hi)), both(y.lo, negate(x.hi))),
                        both(either(x.hi, y.hi), negate(both(x.lo, y.lo))))
    unknown = _smear(x.lo ^ x.hi) | _smear(y.lo ^ y.hi)
    base = x.lo ^ y.lo
    return _signed(base & ~unknown, base | unknown, n.dtype)


_AND_BITS = _bitwise(lambda n, x, y: _and(n, x, y), lambda i, j: i & j)
_or = _bitwise(lambda n, x, y: Interval(either(x.lo, y.lo), either(x.hi, y.hi)),
               lambda i, j: i | j)


def _shl(n: Node, x: Interval, y: Interval) -> Interval:
    k = number_of(y)
    if k is None or not 0 <= k < torch.iinfo(n.dtype).bits:
        return unbounded(n.dtype)
    return Interval(x.lo << k, x.hi << k)


def _shr(n: Node, x: Interval, y: Interval) -> Interval:
    bits = torch.iinfo(n.dtype).bits
    k = number_of(y)
    if k is not None and 0 <= k < bits:
        return Interval(x.lo >> k, x.hi >> k)
    valid = both(y.lo >= 0, y.hi < bits)
    safe = Interval(choose(valid, y.lo, 0), choose(valid, y.hi, 0))
    found, anything = corners(lambda i, j: i >> j, x, safe), integer_range(n.dtype)
    return Interval(choose(valid, found.lo, anything.lo), choose(valid, found.hi, anything.hi))


# Comparison and selection


def _lt(n: Node, x: Interval, y: Interval) -> Interval:
    return _unless_nan(x.hi < y.lo, x.lo < y.hi, x, y)


def _le(n: Node, x: Interval, y: Interval) -> Interval:
    return _unless_nan(x.hi <= y.lo, x.lo <= y.hi, x, y)


def _eq(n: Node, x: Interval, y: Interval) -> Interval:
    return _unless_nan(both(x.lo == y.hi, x.hi == y.lo), both(x.lo <= y.hi, y.lo <= x.hi), x, y)


def _ne(n: Node, x: Interval, y: Interval) -> Interval:
    equal = _eq(n, x, y)
    return Interval(negate(equal.hi), negate(equal.lo))


def _unless_nan(always: Bound, perhaps: Bound, x: Interval, y: Interval) -> Interval:
    return Interval(both(always, negate(any_nan(x, y))), perhaps)


def _where(n: Node, c: Interval, x: Interval, y: Interval) -> Interval:
    if c.lo is True or c.hi is False:
        return x if c.lo is True else y
    if n.dtype is torch.bool:
        lo = either(either(both(c.lo, x.lo), both(negate(c.hi), y.lo)), both(x.lo, y.lo))
        return Interval(lo, either(both(c.hi, x.hi), both(negate(c.lo), y.hi)))
    either_one = hull(x, y, n.dtype)
    nan = either(both(c.hi, x.nan), both(negate(c.lo), y.nan))
    return Interval(choose(c.lo, x.lo, choose(c.hi, either_one.lo, y.lo)),
                    choose(c.lo, x.hi, choose(c.hi, either_one.hi, y.hi)), nan)


# Conversion


def _cast(n: Node, x: Interval) -> Interval:
    source = n.args[0].dtype
    if n.dtype is torch.bool:
        zero = both(x.lo == 0, x.hi == 0)
        return Interval(either(x.lo > 0, x.hi < 0), either(negate(zero), x.nan))
    if source is torch.bool:
        return Interval(*(_of_bool(b, n.dtype in FLOATS) for b in x[:2]))
    if n.dtype in FLOATS:
        return Interval(as_dtype(x.lo, n.dtype), as_dtype(x.hi, n.dtype), x.nan)
    return _truncated(n, x) if source in FLOATS else x


def _of_bool(x: Any, real: bool) -> Bound:
    if is_number(x):
        return float(x) if real else int(x)
    return x.double() if real else x.long()


def _truncated(n: Node, x: Interval) -> Interval:
    """Towards zero; anything for NaN and for numbers that do not fit."""
    anything = integer_range(n.dtype)
    largest = min(anything.hi, 2**62)
    fits = both(both(x.lo >= max(anything.lo, -(2**62)), x.hi <= largest), negate(x.nan))

    def convert(bound: Bound, otherwise: int) -> Bound:
        if is_number(bound):
            return choose(fits, int(bound) if abs(bound) < 2**62 else otherwise, otherwise)
        return choose(fits, choose(fits, bound, 0.0).trunc().long(), otherwise)

    return Interval(convert(x.lo, anything.lo), convert(x.hi, anything.hi))


TABLE: dict[Op, Rule] = {
    Op.CAST: _cast,
    Op.SQRT: monotone(torch.sqrt, lowest=0.0, domain=0.0),
    Op.RSQRT: rsqrt,
    Op.EXP: monotone(torch.exp, lowest=0.0),
    Op.EXP2: monotone(torch.exp2, lowest=0.0),
    Op.EXPM1: monotone(torch.expm1, lowest=-1.0),
    Op.LOG: monotone(torch.log, domain=0.0),
    Op.LOG2: monotone(torch.log2, domain=0.0),
    Op.LOG1P: monotone(torch.log1p, domain=-1.0),
    Op.SIN: wave,
    Op.COS: wave,
    Op.TANH: monotone(torch.tanh, -1.0, 1.0),
    Op.SIGMOID: monotone(torch.sigmoid, 0.0, 1.0),
    Op.ERF: monotone(torch.erf, -1.0, 1.0, slack=1e-6),  # as vectorised on a CPU
    Op.FLOOR: stepped(torch.floor),
    Op.CEIL: stepped(torch.ceil),
    Op.TRUNC: stepped(torch.trunc),
    Op.ROUND: stepped(torch.round),
    Op.NEG: negative,
    Op.ABS: absolute,
    Op.SIGN: sign_of,
    Op.NOT: _not,
    Op.ADD: add,
    Op.SUB: subtract,
    Op.MUL: multiply,
    Op.DIV: divide,
    Op.FLOORDIV: floor_divide,
    Op.MOD: remainder,
    Op.POW: power,
    Op.MIN: least,
    Op.MAX: greatest,
    Op.AND: _and,
    Op.OR: _or,
    Op.XOR: _xor,
    Op.SHL: _shl,
    Op.SHR: _shr,
    Op.LT: _lt,
    Op.LE: _le,
    Op.EQ: _eq,
    Op.NE: _ne,
    Op.WHERE: _where,
}
