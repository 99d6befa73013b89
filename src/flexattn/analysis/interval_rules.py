"""The interval of each operation from the intervals of its operands: one table.

In: a node and an Interval for each argument. Out: an Interval that holds every value the operation
can take. Integer rules are exact mathematics: what leaves the node's dtype is seen, and widened, by
the caller (`analysis.interval`). Floating-point rules compute in float64 and widen to what the
node's dtype may round to. An integer divisor may be zero: the value is then anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flexattn.analysis.bounds import (
    Bound,
    Interval,
    as_dtype,
    both,
    choose,
    either,
    integer_range,
    maximum,
    minimum,
    negate,
    point,
    through_tensor,
    through_tensors,
    unbounded,
    widen,
    without_nan,
)
from flexattn.ir.graph import Node
from flexattn.ir.ops import FLOATS, Op

Rule = Callable[..., Interval]
_ULPS = 8  # of functions that are not correctly rounded, on any device
_INF = torch.inf


# Helpers


def _number(x: Interval) -> int | float | None:
    """The value, where it is one Python number."""
    return None if isinstance(x.lo, Tensor) or not x.is_point else x.lo


def _any_nan(*xs: Interval) -> Bound:
    nan: Bound = False
    for x in xs:
        nan = either(nan, x.nan)
    return nan


def _holds_zero(x: Interval) -> Bound:
    return both(x.lo <= 0, x.hi >= 0)


def _infinite(x: Interval) -> Bound:
    return either(x.lo == -_INF, x.hi == _INF)


def _corners(op: Callable[[Bound, Bound], Bound], x: Interval, y: Interval) -> Interval:
    """Extremes of an operation that is monotone in each operand."""
    xs = (x.lo,) if x.is_point else (x.lo, x.hi)
    ys = (y.lo,) if y.is_point else (y.lo, y.hi)
    found = [op(i, j) for i in xs for j in ys]
    lo = hi = found[0]
    for value in found[1:]:
        lo, hi = minimum(lo, value), maximum(hi, value)
    return Interval(lo, hi)


def _hull(x: Interval, y: Interval, dtype: torch.dtype) -> Interval:
    if dtype is torch.bool:
        return Interval(both(x.lo, y.lo), either(x.hi, y.hi))
    return Interval(minimum(x.lo, y.lo), maximum(x.hi, y.hi), either(x.nan, y.nan))


def _rounded(n: Node, lo: Bound, hi: Bound, nan: Bound, ulps: int = 0) -> Interval:
    return Interval(*widen(without_nan(lo, -_INF), without_nan(hi, _INF), n.dtype, ulps), nan)


# Both integers and floating point


def _add(n: Node, x: Interval, y: Interval) -> Interval:
    if n.dtype not in FLOATS:
        return _same(x, y, x.lo + y.lo, lambda: x.hi + y.hi)
    opposite = either(both(x.hi == _INF, y.lo == -_INF), both(x.lo == -_INF, y.hi == _INF))
    return _rounded(n, x.lo + y.lo, x.hi + y.hi, either(_any_nan(x, y), opposite))


def _same(x: Interval, y: Interval, lo: Bound, hi: Callable[[], Bound]) -> Interval:
    """A point where both operands are points."""
    return Interval(lo, lo if x.is_point and y.is_point else hi())


def _sub(n: Node, x: Interval, y: Interval) -> Interval:
    if n.dtype in FLOATS:
        return _add(n, x, Interval(-y.hi, -y.lo, y.nan))
    return _same(x, y, x.lo - y.hi, lambda: x.hi - y.lo)


def _neg(n: Node, x: Interval) -> Interval:
    lo = -x.hi
    return Interval(lo, lo if x.is_point else -x.lo, x.nan)


def _abs(n: Node, x: Interval) -> Interval:
    if not isinstance(x.lo, Tensor) and x.lo >= 0:
        return x
    zero = 0.0 if n.dtype in FLOATS else 0
    return Interval(maximum(maximum(x.lo, -x.hi), zero), maximum(-x.lo, x.hi), x.nan)


def _sign(n: Node, x: Interval) -> Interval:
    def sign(value: Bound) -> Bound:
        return value.sign() if isinstance(value, Tensor) else type(value)((value > 0) - (value < 0))

    lo, hi = sign(x.lo), sign(x.hi)
    if x.nan is False:
        return Interval(lo, hi)
    return Interval(minimum(lo, 0.0), maximum(hi, 0.0), x.nan)


def _mul(n: Node, x: Interval, y: Interval) -> Interval:
    if n.args[0] is n.args[1]:
        return _square(n, x)
    real = n.dtype in FLOATS
    found = _corners((lambda i, j: without_nan(i * j, 0.0)) if real else (lambda i, j: i * j), x, y)
    if not real:
        return found
    nan = either(both(_holds_zero(x), _infinite(y)), both(_holds_zero(y), _infinite(x)))
    return _rounded(n, found.lo, found.hi, either(_any_nan(x, y), nan))


def _square(n: Node, x: Interval) -> Interval:
    size = _abs(n, x)
    lo, hi = size.lo * size.lo, size.hi * size.hi
    return _rounded(n, lo, hi, x.nan) if n.dtype in FLOATS else Interval(lo, hi)


def _min(n: Node, x: Interval, y: Interval) -> Interval:
    return _same_nan(x, y, minimum(x.lo, y.lo), lambda: minimum(x.hi, y.hi))


def _max(n: Node, x: Interval, y: Interval) -> Interval:
    return _same_nan(x, y, maximum(x.lo, y.lo), lambda: maximum(x.hi, y.hi))


def _same_nan(x: Interval, y: Interval, lo: Bound, hi: Callable[[], Bound]) -> Interval:
    found = _same(x, y, lo, hi)
    return Interval(found.lo, found.hi, either(x.nan, y.nan))


# Division


def _floordiv(n: Node, x: Interval, y: Interval) -> Interval:
    if n.dtype in FLOATS:
        quotient = _div(n, x, y)  # its floor may be one off that of the rounded quotient
        return _rounded(n, _floor_of(quotient.lo) - 1, _floor_of(quotient.hi) + 1, quotient.nan, 1)
    c = _number(y)
    if c is not None and c > 0:
        return Interval(x.lo // c, x.hi // c)
    zero = _holds_zero(y)
    if zero is True:
        return unbounded(n.dtype)
    safe = Interval(choose(zero, 1, y.lo), choose(zero, 1, y.hi))
    found = _corners(lambda i, j: i // j, x, safe)
    anything = integer_range(n.dtype)
    return Interval(choose(zero, anything.lo, found.lo), choose(zero, anything.hi, found.hi))


def _mod(n: Node, x: Interval, y: Interval) -> Interval:
    """Within a period it is x less a constant; else anything between 0 and the divisor."""
    if n.dtype in FLOATS:
        return _float_mod(n, x, y)
    c = _number(y)
    if c is not None and c > 0:
        return periodic(x, int(c))
    lo, hi = minimum(y.lo + 1, 0), maximum(y.hi - 1, 0)
    inside = both(x.lo >= 0, x.hi < y.lo)
    return Interval(choose(inside, x.lo, lo), choose(inside, x.hi, hi))


def periodic(x: Interval, period: int) -> Interval:
    """x mod a positive constant."""
    shift = period.bit_length() - 1
    power = period == 1 << shift
    first, last = ((b >> shift if power else b // period) for b in (x.lo, x.hi))
    whole = first == last
    base = first << shift if power else first * period
    return Interval(choose(whole, x.lo - base, 0), choose(whole, x.hi - base, period - 1))


def _float_mod(n: Node, x: Interval, y: Interval) -> Interval:
    inside = both(both(x.lo >= 0, x.hi < y.lo), negate(_any_nan(x, y)))
    nan = either(either(_any_nan(x, y), _infinite(x)), _holds_zero(y))
    return Interval(choose(inside, x.lo, minimum(y.lo, 0.0)),
                    choose(inside, x.hi, maximum(y.hi, 0.0)), nan)


def _div(n: Node, x: Interval, y: Interval) -> Interval:
    zero = _holds_zero(y)
    divide = through_tensors(torch.div)
    safe = Interval(choose(zero, 1.0, y.lo), choose(zero, 1.0, y.hi))
    quotients = [divide(i, j) for i in (x.lo, x.hi) for j in (safe.lo, safe.hi)]
    lo, hi = (without_nan(quotients[0], -s) for s in (-_INF, _INF))
    for quotient in quotients[1:]:
        lo = minimum(lo, without_nan(quotient, _INF))
        hi = maximum(hi, without_nan(quotient, -_INF))
    # only infinity / infinity: no number at all
    lo, hi = choose(lo > hi, -_INF, lo), choose(lo > hi, _INF, hi)
    nan = either(either(both(zero, _holds_zero(x)), both(_infinite(x), _infinite(y))),
                 _any_nan(x, y))
    return _rounded(n, choose(zero, -_INF, lo), choose(zero, _INF, hi), nan)


def _pow(n: Node, x: Interval, y: Interval) -> Interval:
    k = _number(y)
    if n.dtype in FLOATS:
        return _float_pow(n, x, y, k)
    if k is None or not 0 <= k <= 64 or isinstance(x.lo, Tensor):
        return unbounded(n.dtype)
    return _power_of(x, int(k)) if k else point(1)


def _power_of(x: Interval, k: int) -> Interval:
    """x^k for k > 0, of Python integers: even powers of the size, odd ones monotone."""
    if k % 2:
        return Interval(x.lo ** k, x.hi ** k)
    return Interval(max(x.lo, -x.hi, 0) ** k, max(-x.lo, x.hi) ** k)


def _float_pow(n: Node, x: Interval, y: Interval, k: float | None) -> Interval:
    if k == 0:
        return point(1.0)  # even of NaN
    power = through_tensors(torch.pow)
    positive = x.lo > 0
    if k is not None and k > 0 and k == int(min(k, 2.0**53)):
        size = _abs(n, x) if k % 2 == 0 else x
        found = Interval(power(size.lo, k), power(size.hi, k))
        return _rounded(n, found.lo, found.hi, x.nan, 2 * _ULPS)
    safe = Interval(choose(positive, x.lo, 1.0), choose(positive, x.hi, 1.0))
    found = _corners(lambda i, j: power(i, j), safe, y)
    known = both(positive, negate(_any_nan(x, y)))
    lo, hi = choose(known, found.lo, -_INF), choose(known, found.hi, _INF)
    return _rounded(n, lo, hi, negate(known), 2 * _ULPS)


# Floating point, one operand


def _floor_of(x: Bound) -> Bound:
    return through_tensor(torch.floor)(x)


def _monotone(op: Callable[[Tensor], Tensor], lowest: float = -_INF, highest: float = _INF,
              domain: float = -_INF) -> Rule:
    """An increasing function with values in [lowest, highest]; NaN below its domain."""
    apply = through_tensor(op)

    def rule(n: Node, x: Interval) -> Interval:
        inside = Interval(maximum(x.lo, domain), maximum(x.hi, domain))
        found = _rounded(n, apply(inside.lo), apply(inside.hi), x.nan, _ULPS)
        nan = x.nan if domain == -_INF else either(x.nan, x.lo < domain)
        return Interval(maximum(found.lo, lowest), minimum(found.hi, highest), nan)

    return rule


def _stepped(op: Callable[[Tensor], Tensor]) -> Rule:
    """Rounding to integers: exact."""
    apply = through_tensor(op)
    return lambda n, x: Interval(apply(x.lo), apply(x.hi), x.nan)


def _rsqrt(n: Node, x: Interval) -> Interval:
    """Decreasing; +-infinity at +-0."""
    apply = through_tensor(torch.rsqrt)
    inside = Interval(maximum(x.lo, 0.0), maximum(x.hi, 0.0))
    found = _rounded(n, apply(inside.hi), apply(inside.lo), False, _ULPS)
    lo = choose(_holds_zero(x), -_INF, maximum(found.lo, 0.0))
    return Interval(lo, found.hi, either(x.nan, x.lo < 0))


def _wave(n: Node, x: Interval) -> Interval:
    return Interval(-1.0, 1.0, either(x.nan, _infinite(x)))


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
    if not isinstance(x, Tensor):
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
    c = _number(y)
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
    k = _number(y)
    if k is None or not 0 <= k < torch.iinfo(n.dtype).bits:
        return unbounded(n.dtype)
    return Interval(x.lo << k, x.hi << k)


def _shr(n: Node, x: Interval, y: Interval) -> Interval:
    bits = torch.iinfo(n.dtype).bits
    k = _number(y)
    if k is not None and 0 <= k < bits:
        return Interval(x.lo >> k, x.hi >> k)
    valid = both(y.lo >= 0, y.hi < bits)
    safe = Interval(choose(valid, y.lo, 0), choose(valid, y.hi, 0))
    found, anything = _corners(lambda i, j: i >> j, x, safe), integer_range(n.dtype)
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
    return Interval(both(always, negate(_any_nan(x, y))), perhaps)


def _where(n: Node, c: Interval, x: Interval, y: Interval) -> Interval:
    if c.lo is True or c.hi is False:
        return x if c.lo is True else y
    if n.dtype is torch.bool:
        lo = either(either(both(c.lo, x.lo), both(negate(c.hi), y.lo)), both(x.lo, y.lo))
        return Interval(lo, either(both(c.hi, x.hi), both(negate(c.lo), y.hi)))
    either_one = _hull(x, y, n.dtype)
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
    if isinstance(x, Tensor):
        return x.double() if real else x.long()
    return float(x) if real else int(x)


def _truncated(n: Node, x: Interval) -> Interval:
    """Towards zero; anything for NaN and for numbers that do not fit."""
    anything = integer_range(n.dtype)
    largest = min(anything.hi, 2**62)
    fits = both(both(x.lo >= max(anything.lo, -(2**62)), x.hi <= largest), negate(x.nan))

    def convert(bound: Bound, otherwise: int) -> Bound:
        if isinstance(bound, Tensor):
            return choose(fits, choose(fits, bound, 0.0).trunc().long(), otherwise)
        return choose(fits, int(bound) if abs(bound) < 2**62 else otherwise, otherwise)

    return Interval(convert(x.lo, anything.lo), convert(x.hi, anything.hi))


TABLE: dict[Op, Rule] = {
    Op.CAST: _cast,
    Op.SQRT: _monotone(torch.sqrt, lowest=0.0, domain=0.0),
    Op.RSQRT: _rsqrt,
    Op.EXP: _monotone(torch.exp, lowest=0.0),
    Op.EXP2: _monotone(torch.exp2, lowest=0.0),
    Op.EXPM1: _monotone(torch.expm1, lowest=-1.0),
    Op.LOG: _monotone(torch.log, domain=0.0),
    Op.LOG2: _monotone(torch.log2, domain=0.0),
    Op.LOG1P: _monotone(torch.log1p, domain=-1.0),
    Op.SIN: _wave,
    Op.COS: _wave,
    Op.TANH: _monotone(torch.tanh, -1.0, 1.0),
    Op.SIGMOID: _monotone(torch.sigmoid, 0.0, 1.0),
    Op.ERF: _monotone(torch.erf, -1.0, 1.0),
    Op.FLOOR: _stepped(torch.floor),
    Op.CEIL: _stepped(torch.ceil),
    Op.TRUNC: _stepped(torch.trunc),
    Op.ROUND: _stepped(torch.round),
    Op.NEG: _neg,
    Op.ABS: _abs,
    Op.SIGN: _sign,
    Op.NOT: _not,
    Op.ADD: _add,
    Op.SUB: _sub,
    Op.MUL: _mul,
    Op.DIV: _div,
    Op.FLOORDIV: _floordiv,
    Op.MOD: _mod,
    Op.POW: _pow,
    Op.MIN: _min,
    Op.MAX: _max,
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
