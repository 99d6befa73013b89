"""The grammar of a mod: every operation on scalars, with the types it takes and gives.

A mod is a graph of these operations. Each pass (evaluate, gradient, interval, lowerings) owns a
table keyed by `Op`; a test demands that every table covers every Op.

Types are torch dtypes. Operands of one operation have one common dtype: the tracer inserts CAST
where torch would promote. Semantics are torch's on tensors, NaN and signed zeros included:
MIN/MAX propagate NaN, FLOORDIV and MOD round towards minus infinity (Python's), integers wrap in
their width, ROUND is half to even, SHR is arithmetic, a constant exponent of POW is torch's
Python number (x ** 0.5 is a square root). An integer divided by zero has an
unspecified value but must never trap.
"""

from __future__ import annotations

from enum import IntEnum, unique

import torch


@unique
class Op(IntEnum):
    # Leaves
    INPUT = 1  # attr: name, one of "score", "b", "h", "q_idx", "kv_idx", "grad"
    NUMBER = 2  # attr: slot; a Python number that is a run-time argument (int64, float64, bool)
    CONST = 3  # attr: the Python value
    LOAD = 4  # attr: capture slot; args: one int64 index per dimension of the captured tensor
    CAST = 5  # to node.dtype, torch's conversion rules
    # Floating point, one operand
    SQRT = 10
    RSQRT = 11
    EXP = 12
    EXP2 = 13
    EXPM1 = 14
    LOG = 15
    LOG2 = 16
    LOG1P = 17
    SIN = 18
    COS = 19
    TANH = 20
    SIGMOID = 21
    ERF = 22
    FLOOR = 23
    CEIL = 24
    TRUNC = 25
    ROUND = 26
    # Numbers, one operand
    NEG = 30
    ABS = 31
    SIGN = 32
    NOT = 33  # logical for bool, bitwise for integers
    # Numbers, two operands
    ADD = 40
    SUB = 41
    MUL = 42
    DIV = 43  # floating point only
    FLOORDIV = 44
    MOD = 45
    POW = 46
    MIN = 47  # attr: None, or CLAMP
    MAX = 48
    # Bool or integer, two operands
    AND = 50
    OR = 51
    XOR = 52
    SHL = 53
    SHR = 54
    # Comparison: two operands of one dtype, gives bool (a > b is written b < a)
    LT = 60
    LE = 61
    EQ = 62
    NE = 63
    # Selection: condition (bool), value if true, value if false
    WHERE = 70


LEAVES = frozenset({Op.INPUT, Op.NUMBER, Op.CONST, Op.LOAD})
FLOAT_UNARY = frozenset(op for op in Op if Op.SQRT <= op <= Op.ROUND)
UNARY = FLOAT_UNARY | {Op.NEG, Op.ABS, Op.SIGN, Op.NOT}
ARITHMETIC = frozenset(op for op in Op if Op.ADD <= op <= Op.MAX)
BITWISE = frozenset(op for op in Op if Op.AND <= op <= Op.SHR)
COMPARISON = frozenset(op for op in Op if Op.LT <= op <= Op.NE)
BINARY = ARITHMETIC | BITWISE | COMPARISON
COMMUTATIVE = frozenset({Op.ADD, Op.MUL, Op.MIN, Op.MAX, Op.AND, Op.OR, Op.XOR, Op.EQ, Op.NE})

CLAMP = "clamp"  # the gradient of two equal operands goes to the first, not half to each

INDEX_INPUTS = ("b", "h", "q_idx", "kv_idx")
INTEGERS = frozenset({torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8})
FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
DTYPES = INTEGERS | FLOATS | {torch.bool}


def dtype_name(dtype: torch.dtype) -> str:
    """'float32' for torch.float32."""
    return str(dtype).removeprefix("torch.")
