"""Division, powers and shifts of integers in LLVM IR: floor style, never trapping.

In: the lanes they are computed in, the node and its arguments' values. Out: the node's value, as
ir.evaluate defines it; rejects nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from flexattn.ir.graph import Node
from flexattn.lower.llvm_lanes import Lanes, Value, width


def is_unsigned(n: Node) -> bool:
    return n.dtype is torch.uint8


def floor_divide(lanes: Lanes, n: Node, x: Value, y: Value) -> Value:
    x, y = lanes.widest(n, x, y)
    return lanes.resize(_quotient(lanes, n, x, _divisor(lanes, n, y)), lanes.type(n))


def modulo(lanes: Lanes, n: Node, x: Value, y: Value) -> Value:
    divisor = n.args[1].attr if n.args[1].is_const else 0
    if divisor > 0 and divisor & (divisor - 1) == 0:
        return lanes.resize(lanes.e.and_(x, lanes.const(x, divisor - 1)), lanes.type(n))
    type = max((x.type, y.type), key=width)
    x, y = lanes.resize(x, type), _divisor(lanes, n, lanes.resize(y, type))
    rest = lanes.e.sub(x, lanes.e.mul(_quotient(lanes, n, x, y), y))
    return lanes.resize(rest, lanes.type(n))


def _divisor(lanes: Lanes, n: Node, y: Value) -> Value:
    """1 for 0: that gives any value, but must not trap."""
    low, high = lanes.range(n.args[1])
    if low > 0 or high < 0:
        return y
    return lanes.e.select(lanes.e.compare("eq", y, lanes.const(y, 0)), lanes.const(y, 1), y)


def _quotient(lanes: Lanes, n: Node, x: Value, y: Value) -> Value:
    """x / y rounded down, in the type that both have; y is not 0. n gives their ranges."""
    divisor = n.args[1].attr if n.args[1].is_const else None
    if divisor in (0, 1):
        return x
    if divisor is not None and divisor > 0 and divisor & (divisor - 1) == 0:
        shift = lanes.const(x, divisor.bit_length() - 1)
        return lanes.e.op("lshr" if is_unsigned(n) else "ashr", x, shift)
    if divisor not in (None, -1) and not is_unsigned(n):
        return _floor(lanes, n, lanes.e.op("sdiv", x, y), x, y)
    if lanes.count and width(x.type) <= 32:
        return _divide_in_double(lanes, n, x, y)
    return _divide(lanes, n, x, y)


def _floor(lanes: Lanes, n: Node, quotient: Value, x: Value, y: Value) -> Value:
    """The quotient rounded towards zero, made one that is rounded down."""
    if lanes.range(n.args[0])[0] >= 0 and lanes.range(n.args[1])[0] > 0:
        return quotient
    e = lanes.e
    rest = e.sub(x, e.mul(quotient, y))
    inexact = e.compare("ne", rest, lanes.const(x, 0))
    negative = e.compare("slt", e.op("xor", rest, y), lanes.const(x, 0))
    lower = e.add(quotient, lanes.const(x, -1))
    return e.select(e.and_(inexact, negative), lower, quotient)


def _divide_in_double(lanes: Lanes, n: Node, x: Value, y: Value) -> Value:
    """There is no vector division of integers; a double holds 32-bit quotients well enough."""
    e, unsigned = lanes.e, is_unsigned(n)
    opcode = "uitofp" if unsigned else "sitofp"
    quotient = e.fdiv(*(e.cast(opcode, v, lanes.vector("double")) for v in (x, y)))
    whole = e.cast("fptosi", lanes.math("double").intrinsic("floor", quotient),
                   lanes.vector("i32"))
    whole = lanes.resize(whole, x.type)
    return whole if unsigned else _unless_minus_one(lanes, whole, x, y)


def _divide(lanes: Lanes, n: Node, x: Value, y: Value) -> Value:
    """Hardware division traps for -1 and the least integer."""
    if is_unsigned(n):
        return lanes.e.op("udiv", x, y)
    minus_one = lanes.e.compare("eq", y, lanes.const(y, -1))
    divisor = lanes.e.select(minus_one, lanes.const(y, 1), y)
    quotient = _floor(lanes, n, lanes.e.op("sdiv", x, divisor), x, divisor)
    return _unless_minus_one(lanes, quotient, x, y)


def _unless_minus_one(lanes: Lanes, quotient: Value, x: Value, y: Value) -> Value:
    """-x, which may wrap, where y is -1."""
    minus_one = lanes.e.compare("eq", y, lanes.const(y, -1))
    return lanes.e.select(minus_one, lanes.e.sub(lanes.const(x, 0), x), quotient)


def power(lanes: Lanes, n: Node, x: Value, y: Value) -> Value:
    """By squaring; negative exponents give 1, -1 or 0 as ir.evaluate does."""
    e = lanes.e
    x, y = lanes.widest(n, x, y)
    one, zero = lanes.const(x, 1), lanes.const(x, 0)
    with e.loop(0, width(x.type), 1, [one, x, y]) as loop:
        result, base, exponent = loop.values
        odd = e.compare("ne", e.and_(exponent, one), zero)
        loop.next = [e.select(odd, e.mul(result, base), result), e.mul(base, base),
                     e.op("lshr", exponent, one)]
    result = loop.values[0]
    if is_unsigned(n):
        return result
    parity = e.sub(one, e.mul(lanes.const(x, 2), e.and_(y, one)))
    inverse = e.select(e.compare("eq", x, lanes.const(x, -1)), parity, zero)
    inverse = e.select(e.compare("eq", x, one), one, inverse)
    return lanes.resize(e.select(e.compare("slt", y, zero), inverse, result), lanes.type(n))


def shift(opcode: str) -> Callable[..., Value]:
    """Shifts by less than 0 or at least the width give what shifting all bits out gives."""

    def rule(lanes: Lanes, n: Node, x: Value, y: Value) -> Value:
        e = lanes.e
        x, y = lanes.widest(n, x, y)
        bits = width(x.type)
        inside = e.compare("ult", y, lanes.const(y, bits))
        arithmetic = opcode == "ashr" and not is_unsigned(n)
        amount = e.select(inside, y, lanes.const(y, bits - 1 if arithmetic else 0))
        shifted = e.op("lshr" if opcode == "ashr" and is_unsigned(n) else opcode, x, amount)
        if not arithmetic:
            shifted = e.select(inside, shifted, lanes.const(x, 0))
        return lanes.resize(shifted, lanes.type(n))

    return rule
