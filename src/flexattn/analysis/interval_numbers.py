"""The intervals of arithmetic and of functions of one number.

In: a node and an Interval for each argument. Out: an Interval that holds every value the operation
can take. Integer rules are exact mathematics: what leaves the node's dtype is seen, and widened, by
the caller (`analysis.interval`). Floating-point rules compute in float64 and widen to what the
node's dtype may round to. An integer divisor may be zero: the value is then anything.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flexattn.analysis.bounds import (
    Bound,
    Interval,
    both,
    choose,
    either,
    integer_range,
    is_number,
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
from flexattn.ir.ops import FLOATS

Rule = Callable[..., Interval]
_ULPS = 8  # of functions that are not correctly rounded, on any device
_INF = torch.inf


def number_of(x: Interval) -> int | float | None:
    """The value, where it is one Python number."""
    return x.lo if x.is_point and is_number(x.lo) else None


def any_nan(*xs: Interval) -> Bound:
    nan: Bound = False
    for x in xs:
        nan = either(nan, x.nan)
    return nan


def holds_zero(x: Interval) -> Bound:
    return both(x.lo <= 0, x.hi >= 0)


def infinite(x: Interval) -> Bound:
    return either(x.lo == -_INF, x.hi == _INF)


def corners(op: Callable[[Bound, Bound], Bound], x: Interval, y: Interval) -> Interval:
    """Extremes of an operation that is monotone in each operand."""
    xs = (x.lo,) if x.is_point else (x.lo, x.hi)
    ys = (y.lo,) if y.is_point else (y.lo, y.hi)
    found = [op(i, j) for i in xs for j in ys]
    lo = hi = found[0]
    for value in found[1:]:
        lo, hi = minimum(lo, value), maximum(hi, value)
    return Interval(lo, hi)


def hull(x: Interval, y: Interval, dtype: torch.dtype) -> Interval:
    if dtype is torch.bool:
        return Interval(both(x.lo, y.lo), either(x.hi, y.hi))
    return Interval(minimum(x.lo, y.lo), maximum(x.hi, y.hi), either(x.nan, y.nan))


def rounded(n: Node, lo: Bound, hi: Bound, nan: Bound, ulps: int = 0) -> Interval:
    return Interval(*widen(without_nan(lo, -_INF), without_nan(hi, _INF), n.dtype, ulps), nan)


# Both integers and floating point


def add(n: Node, x: Interval, y: Interval) -> Interval:
    if n.dtype not in FLOATS:
        return exact(x, y, x.lo + y.lo, lambda: x.hi + y.hi)
    opposite = either(both(x.hi == _INF, y.lo == -_INF), both(x.lo == -_INF, y.hi == _INF))
    return rounded(n, x.lo + y.lo, x.hi + y.hi, either(any_nan(x, y), opposite))


def exact(x: Interval, y: Interval, lo: Bound, hi: Callable[[], Bound]) -> Interval:
    """A point where both operands are points."""
    return Interval(lo, lo if x.is_point and y.is_point else hi())


def subtract(n: Node, x: Interval, y: Interval) -> Interval:
    if n.dtype in FLOATS:
        return add(n, x, Interval(-y.hi, -y.lo, y.nan))
    return exact(x, y, x.lo - y.hi, lambda: x.hi - y.lo)


def negative(n: Node, x: Interval) -> Interval:
    lo = -x.hi
    return Interval(lo, lo if x.is_point else -x.lo, x.nan)


def absolute(n: Node, x: Interval) -> Interval:
    if is_number(x.lo) and x.lo >= 0:
        return x
    zero = 0.0 if n.dtype in FLOATS else 0
    return Interval(maximum(maximum(x.lo, -x.hi), zero), maximum(-x.lo, x.hi), x.nan)


def sign_of(n: Node, x: Interval) -> Interval:
    def sign(value: Bound) -> Bound:
        return type(value)((value > 0) - (value < 0)) if is_number(value) else value.sign()

    lo, hi = sign(x.lo), sign(x.hi)
    if x.nan is False:
        return Interval(lo, hi)
    return Interval(minimum(lo, 0.0), maximum(hi, 0.0), x.nan)


def multiply(n: Node, x: Interval, y: Interval) -> Interval:
    if n.args[0] is n.args[1]:
        return _square(n, x)
    real = n.dtype in FLOATS
    found = corners((lambda i, j: without_nan(i * j, 0.0)) if real else (lambda i, j: i * j), x, y)
    if not real:
        return found
    nan = either(both(holds_zero(x), infinite(y)), both(holds_zero(y), infinite(x)))
    return rounded(n, found.lo, found.hi, either(any_nan(x, y), nan))


def _square(n: Node, x: Interval) -> Interval:
    size = absolute(n, x)
    lo, hi = size.lo * size.lo, size.hi * size.hi
    return rounded(n, lo, hi, x.nan) if n.dtype in FLOATS else Interval(lo, hi)


def least(n: Node, x: Interval, y: Interval) -> Interval:
    return _same_nan(x, y, minimum(x.lo, y.lo), lambda: minimum(x.hi, y.hi))


def greatest(n: Node, x: Interval, y: Interval) -> Interval:
    return _same_nan(x, y, maximum(x.lo, y.lo), lambda: maximum(x.hi, y.hi))


def _same_nan(x: Interval, y: Interval, lo: Bound, hi: Callable[[], Bound]) -> Interval:
    found = exact(x, y, lo, hi)
    return Interval(found.lo, found.hi, either(x.nan, y.nan))


# Division


def floor_divide(n: Node, x: Interval, y: Interval) -> Interval:
    if n.dtype in FLOATS:
        quotient = divide(n, x, y)  # its floor may be one off that of the rounded quotient
        nan = either(quotient.nan, infinite(x))
        return rounded(n, _floor_of(quotient.lo) - 1, _floor_of(quotient.hi) + 1, nan, 1)
    c = number_of(y)
    if c is not None and c > 0:
        return Interval(x.lo // c, x.hi // c)
    zero = holds_zero(y)
    if zero is True:
        return unbounded(n.dtype)
    safe = Interval(choose(zero, 1, y.lo), choose(zero, 1, y.hi))
    found = corners(lambda i, j: i // j, x, safe)
    anything = integer_range(n.dtype)
    return Interval(choose(zero, anything.lo, found.lo), choose(zero, anything.hi, found.hi))


def remainder(n: Node, x: Interval, y: Interval) -> Interval:
    """Within a period it is x less a constant; else anything between 0 and the divisor."""
    if n.dtype in FLOATS:
        return _float_mod(n, x, y)
    c = number_of(y)
    if c is not None and c > 0:
        return periodic(x, int(c))
    lo, hi = minimum(y.lo + 1, 0), maximum(y.hi - 1, 0)
    if y.is_point:
        positive = y.lo > 0
        safe = choose(positive, y.lo, 1)
        inside = both(positive, x.lo // safe == x.hi // safe)
        x = Interval(x.lo % safe, x.hi % safe)
    else:
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
    inside = both(both(x.lo >= 0, x.hi < y.lo), negate(any_nan(x, y)))
    nan = either(either(any_nan(x, y), infinite(x)), holds_zero(y))
    return Interval(choose(inside, x.lo, minimum(y.lo, 0.0)),
                    choose(inside, x.hi, maximum(y.hi, 0.0)), nan)


def divide(n: Node, x: Interval, y: Interval) -> Interval:
    zero = holds_zero(y)
    ratio = through_tensors(torch.div)
    safe = Interval(choose(zero, 1.0, y.lo), choose(zero, 1.0, y.hi))
    quotients = [ratio(i, j) for i in (x.lo, x.hi) for j in (safe.lo, safe.hi)]
    lo, hi = (without_nan(quotients[0], -s) for s in (-_INF, _INF))
    for quotient in quotients[1:]:
        lo = minimum(lo, without_nan(quotient, _INF))
        hi = maximum(hi, without_nan(quotient, -_INF))
    # only infinity / infinity: no number at all
    lo, hi = choose(lo > hi, -_INF, lo), choose(lo > hi, _INF, hi)
    nan = either(either(both(zero, holds_zero(x)), both(infinite(x), infinite(y))),
                 any_nan(x, y))
    return rounded(n, choose(zero, -_INF, lo), choose(zero, _INF, hi), nan)


def power(n: Node, x: Interval, y: Interval) -> Interval:
    k = number_of(y)
    if n.dtype in FLOATS:
        return _float_pow(n, x, y, k)
    if k is None or not 0 <= k <= 64 or not is_number(x.lo):
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
    raised = through_tensors(torch.pow)
    positive = x.lo > 0
    if k is not None and k > 0 and k == int(min(k, 2.0**53)):
        size = absolute(n, x) if k % 2 == 0 else x
        found = Interval(raised(size.lo, k), raised(size.hi, k))
        return rounded(n, found.lo, found.hi, x.nan, 2 * _ULPS)
    safe = Interval(choose(positive, x.lo, 1.0), choose(positive, x.hi, 1.0))
    found = corners(lambda i, j: raised(i, j), safe, y)
    known = both(positive, negate(any_nan(x, y)))
    lo, hi = choose(known, found.lo, -_INF), choose(known, found.hi, _INF)
    return rounded(n, lo, hi, negate(known), 2 * _ULPS)


# Floating point, one operand


def _floor_of(x: Bound) -> Bound:
    return through_tensor(torch.floor)(x)


def monotone(op: Callable[[Tensor], Tensor], lowest: float = -_INF, highest: float = _INF,
              domain: float = -_INF, slack: float = 0.0) -> Rule:
    """An increasing function with values in [lowest, highest]; NaN below its domain. slack: an
    absolute error."""
    apply = through_tensor(op)

    def rule(n: Node, x: Interval) -> Interval:
        inside = Interval(maximum(x.lo, domain), maximum(x.hi, domain))
        found = rounded(n, apply(inside.lo), apply(inside.hi), x.nan, _ULPS)
        nan = x.nan if domain == -_INF else either(x.nan, x.lo < domain)
        lo, hi = (found.lo - slack, found.hi + slack) if slack else found[:2]
        return Interval(maximum(lo, lowest), minimum(hi, highest), nan)

    return rule


def stepped(op: Callable[[Tensor], Tensor]) -> Rule:
    """Rounding to integers: exact."""
    apply = through_tensor(op)
    return lambda n, x: Interval(apply(x.lo), apply(x.hi), x.nan)


def rsqrt(n: Node, x: Interval) -> Interval:
    """Decreasing; +-infinity at +-0."""
    apply = through_tensor(torch.rsqrt)
    inside = Interval(maximum(x.lo, 0.0), maximum(x.hi, 0.0))
    found = rounded(n, apply(inside.hi), apply(inside.lo), False, _ULPS)
    zero = holds_zero(x)
    lo = choose(zero, -_INF, maximum(found.lo, 0.0))
    return Interval(lo, choose(zero, _INF, found.hi), either(x.nan, x.lo < 0))


def wave(n: Node, x: Interval) -> Interval:
    return Interval(-1.0, 1.0, either(x.nan, infinite(x)))
