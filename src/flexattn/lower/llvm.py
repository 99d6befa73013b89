"""Operations of a mod as LLVM IR: one node of a graph, in vector lanes or as a scalar.

In: the lanes (an emitter of LLVM IR and how many), a node and the values of its arguments. Out:
the node's value, held as lower.llvm_lanes says. Rejects nothing: graphs are verified when built.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from flexattn.ir.graph import Node
from flexattn.ir.ops import FLOATS, INTEGERS, Op
from flexattn.lower import llvm_integers
from flexattn.lower.llvm_integers import is_unsigned
from flexattn.lower.llvm_lanes import HALVES, Lanes, Value, real_type, width

_EXACT = frozenset({Op.NEG, Op.ABS, Op.SIGN, Op.MIN, Op.MAX, Op.WHERE, Op.FLOOR, Op.CEIL, Op.TRUNC,
                    Op.ROUND})


def compute(lanes: Lanes, n: Node, *args: Value) -> Value:
    """The node's value from its arguments'."""
    value = TABLE[n.op](lanes, n, *args)
    if n.dtype in HALVES and n.op not in _EXACT:
        return lanes.round_half(value, n.dtype)
    return value


Rule = Callable[..., Value]  # (lanes, node, *argument values) -> value


def _is_float(n: Node) -> bool:
    return n.dtype in FLOATS


def _by_kind(of_floats: Rule, of_integers: Rule) -> Rule:
    return lambda lanes, n, x, y: (of_floats if _is_float(n) else of_integers)(lanes, n, x, y)


# Conversions


def _cast(lanes: Lanes, n: Node, x: Value) -> Value:
    source = n.args[0]
    if n.dtype is torch.bool:
        return _not_equal(lanes, n, x, lanes.const(x, 0))
    if source.dtype is torch.bool:
        return lanes.e.select(x, lanes.e.const(lanes.type(n), 1), lanes.e.const(lanes.type(n), 0))
    if _is_float(source):
        return _float_to_float(lanes, n, x) if _is_float(n) else _float_to_integer(lanes, n, x)
    if _is_float(n):
        if width(x.type) < 32:
            x = lanes.resize(x, lanes.vector("i32"), not is_unsigned(source))
        return lanes.e.cast("sitofp", x, lanes.type(n))
    return lanes.resize(x, lanes.type(n), not is_unsigned(source))


def _float_to_float(lanes: Lanes, n: Node, x: Value) -> Value:
    have, want = real_type(n.args[0].dtype), real_type(n.dtype)
    if have == want:
        return x
    return lanes.e.cast("fpext" if want == "double" else "fptrunc", x, lanes.type(n))


def _float_to_integer(lanes: Lanes, n: Node, x: Value) -> Value:
    """Saturating where the value does not fit (LLVM leaves the plain conversion undefined)."""
    wide = "i64" if n.dtype is torch.int64 else "i32"
    prefix = f"v{lanes.count}" if lanes.count else ""
    real = {"float": "f32", "double": "f64"}[real_type(n.args[0].dtype)]
    name = f"fptosi.sat.{prefix}{wide}.{prefix}{real}"
    converted = lanes.e.intrinsic(name, lanes.vector(wide), x)
    return lanes.resize(converted, lanes.type(n))


# Floating point


def _math(name: str) -> Rule:
    return lambda lanes, n, *args: getattr(lanes.math(real_type(n.dtype)), name)(*args)


def _intrinsic(name: str) -> Rule:
    return lambda lanes, n, x: lanes.math(real_type(n.dtype)).intrinsic(name, x)


def _rsqrt(lanes: Lanes, n: Node, x: Value) -> Value:
    return lanes.e.fdiv(lanes.const(x, 1.0), _intrinsic("sqrt")(lanes, n, x))


def _float_floor_divide(lanes: Lanes, n: Node, x: Value, y: Value) -> Value:
    """Python's: the remainder is taken off first, so that the quotient is exact before floor."""
    e, math_ = lanes.e, lanes.math(real_type(n.dtype))
    rest = math_.fmod(x, y)
    quotient = e.fdiv(e.fsub(x, rest), y)
    opposite = _opposite_signs(lanes, rest, y)
    quotient = e.select(opposite, e.fsub(quotient, lanes.const(x, 1.0)), quotient)
    whole = math_.intrinsic("floor", quotient)
    above = e.compare("ogt", e.fsub(quotient, whole), lanes.const(x, 0.5))
    whole = e.select(above, e.fadd(whole, lanes.const(x, 1.0)), whole)
    plain = e.fdiv(x, y)
    zero = math_.intrinsic("copysign", lanes.const(x, 0.0), plain)
    whole = e.select(e.compare("oeq", quotient, lanes.const(x, 0.0)), zero, whole)
    return e.select(e.compare("oeq", y, lanes.const(y, 0.0)), plain, whole)


def _float_modulo(lanes: Lanes, n: Node, x: Value, y: Value) -> Value:
    rest = lanes.math(real_type(n.dtype)).fmod(x, y)
    return lanes.e.select(_opposite_signs(lanes, rest, y), lanes.e.fadd(rest, y), rest)


def _opposite_signs(lanes: Lanes, rest: Value, y: Value) -> Value:
    """rest is not 0 and has not the sign of y."""
    e, zero = lanes.e, lanes.const(y, 0.0)
    signs = e.op("xor", e.compare("olt", rest, zero), e.compare("olt", y, zero))
    return e.and_(e.compare("une", rest, zero), signs)


def _power(lanes: Lanes, n: Node, x: Value, y: Value) -> Value:
    exponent = n.args[1].attr if n.args[1].is_const else None
    if exponent in (0.5, -0.5):
        return (_rsqrt if exponent < 0 else _intrinsic("sqrt"))(lanes, n, x)
    if exponent is not None and 1 <= abs(exponent) <= 4 and exponent == int(exponent):
        product = _product_power(lanes, x, int(abs(exponent)))
        return product if exponent > 0 else lanes.e.fdiv(lanes.const(x, 1.0), product)
    return lanes.math(real_type(n.dtype)).pow(x, y)


def _product_power(lanes: Lanes, x: Value, exponent: int) -> Value:
    square = lanes.e.fmul(x, x) if exponent > 1 else x
    return {1: lambda: x, 2: lambda: square, 3: lambda: lanes.e.fmul(square, x),
            4: lambda: lanes.e.fmul(square, square)}[exponent]()


# Numbers of both kinds


def _ring(opcode: str) -> Rule:
    """Operations whose low bits depend on low bits only: computed in the result's own width."""

    def rule(lanes: Lanes, n: Node, x: Value, y: Value) -> Value:
        if _is_float(n):
            return lanes.e.op("f" + opcode, x, y)
        return lanes.e.op(opcode, lanes.resize(x, lanes.type(n)), lanes.resize(y, lanes.type(n)))

    return rule


def _negate(lanes: Lanes, n: Node, x: Value) -> Value:
    if _is_float(n):
        return lanes.e.emit(x.type, f"fneg {x}")
    return lanes.e.sub(lanes.e.const(lanes.type(n), 0), lanes.resize(x, lanes.type(n)))


def _absolute(lanes: Lanes, n: Node, x: Value) -> Value:
    if _is_float(n):
        return lanes.math(real_type(n.dtype)).abs(x)
    if is_unsigned(n) or lanes.range(n.args[0])[0] >= 0:
        return x
    e, (x,) = lanes.e, lanes.widest(n, x)
    zero = lanes.const(x, 0)
    size = e.select(e.compare("slt", x, zero), e.sub(zero, x), x)
    return lanes.resize(size, lanes.type(n))


def _sign(lanes: Lanes, n: Node, x: Value) -> Value:
    e, zero, one = lanes.e, lanes.const(x, 0), lanes.const(x, 1)
    if _is_float(n):
        above, below = (e.compare(p, x, zero) for p in ("ogt", "olt"))
        sign = e.select(below, lanes.const(x, -1.0), zero)
        return e.select(above, one, sign)
    if is_unsigned(n):
        return e.select(e.compare("ugt", x, zero), one, zero)
    below = e.select(e.compare("slt", x, zero), lanes.const(x, -1), zero)
    return lanes.resize(e.select(e.compare("sgt", x, zero), one, below), lanes.type(n))


def _not(lanes: Lanes, n: Node, x: Value) -> Value:
    x = x if n.dtype is torch.bool else lanes.resize(x, lanes.type(n))
    return lanes.e.op("xor", x, lanes.const(x, 1 if n.dtype is torch.bool else -1))


# Comparison and selection


def _extreme(float_predicate: str, predicate: str) -> Rule:
    def rule(lanes: Lanes, n: Node, x: Value, y: Value) -> Value:
        e = lanes.e
        if _is_float(n):
            chosen = e.select(e.compare(float_predicate, x, y), x, y)  # y where either is NaN
            return e.select(e.compare("uno", x, x), x, chosen)
        x, y = lanes.widest(n, x, y)
        sign = "u" if is_unsigned(n) else "s"
        return lanes.resize(e.select(e.compare(sign + predicate, x, y), x, y), lanes.type(n))

    return rule


def _comparison(float_predicate: str, predicate: str) -> Rule:
    def rule(lanes: Lanes, n: Node, x: Value, y: Value) -> Value:
        operand = n.args[0]
        if _is_float(operand):
            return lanes.e.compare(float_predicate, x, y)
        if operand.dtype is torch.bool or is_unsigned(operand):
            sign = "u"
        else:
            sign = "s"
            x, y = lanes.widest(n, x, y)
        return lanes.e.compare(predicate if predicate in ("eq", "ne") else sign + predicate, x, y)

    return rule


_not_equal = _comparison("une", "ne")


def _where(lanes: Lanes, n: Node, condition: Value, x: Value, y: Value) -> Value:
    if n.dtype in INTEGERS:
        x, y = (lanes.resize(v, lanes.type(n)) for v in (x, y))
    return lanes.e.select(condition, x, y)


TABLE: dict[Op, Rule] = {
    Op.CAST: _cast,
    Op.SQRT: _intrinsic("sqrt"),
    Op.RSQRT: _rsqrt,
    Op.EXP: _math("exp"),
    Op.EXP2: _math("exp2"),
    Op.EXPM1: _math("expm1"),
    Op.LOG: _math("log"),
    Op.LOG2: _math("log2"),
    Op.LOG1P: _math("log1p"),
    Op.SIN: _math("sin"),
    Op.COS: _math("cos"),
    Op.TANH: _math("tanh"),
    Op.SIGMOID: _math("sigmoid"),
    Op.ERF: _math("erf"),
    Op.FLOOR: _intrinsic("floor"),
    Op.CEIL: _intrinsic("ceil"),
    Op.TRUNC: _intrinsic("trunc"),
    Op.ROUND: _intrinsic("roundeven"),
    Op.NEG: _negate,
    Op.ABS: _absolute,
    Op.SIGN: _sign,
    Op.NOT: _not,
    Op.ADD: _ring("add"),
    Op.SUB: _ring("sub"),
    Op.MUL: _ring("mul"),
    Op.DIV: lambda lanes, n, x, y: lanes.e.fdiv(x, y),
    Op.FLOORDIV: _by_kind(_float_floor_divide, llvm_integers.floor_divide),
    Op.MOD: _by_kind(_float_modulo, llvm_integers.modulo),
    Op.POW: _by_kind(_power, llvm_integers.power),
    Op.MIN: _extreme("olt", "lt"),
    Op.MAX: _extreme("ogt", "gt"),
    Op.AND: _ring("and"),
    Op.OR: _ring("or"),
    Op.XOR: _ring("xor"),
    Op.SHL: llvm_integers.shift("shl"),
    Op.SHR: llvm_integers.shift("ashr"),
    Op.LT: _comparison("olt", "lt"),
    Op.LE: _comparison("ole", "le"),
    Op.EQ: _comparison("oeq", "eq"),
    Op.NE: _not_equal,
    Op.WHERE: _where,
}
