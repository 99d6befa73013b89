"""The matrix product of a tile, blocked for registers: what attention on a CPU is made of.

In: a left operand of scalars, a right operand packed into panels (cpu_pack.py), accumulators.
Out: the accumulators with the product added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from flexattn.kernels.cpu_dsl import Emitter, Value, const, i64

Accumulators = list[list[Value]]  # [row][vector]
PAIRS = "pairs"  # storage of words that hold two bfloat16
WORDS = {"float32": "float", "bfloat16": "i16", "float16": "half", "float64": "double",
         PAIRS: "float"}


def accumulators(e: Emitter, rows: int, vectors: int) -> Accumulators:
    return [[e.number(0.0)] * vectors for _ in range(rows)]


@dataclass(frozen=True)
class Left:
    """The left operand, scalars of the type computed in: element (i, k) is
    pointer[i * row + k * depth]. row=LD, depth=1 reads A; row=1, depth=LD reads A transposed.
    Words of pairs where the right operand is."""

    pointer: Value
    row: int
    depth: int = 1


@dataclass(frozen=True)
class Right:
    """The right operand, a packed panel of `columns` columns: [depth][columns] in `storage`; in a
    line of bfloat16 two vectors are interleaved, so that one load serves both. PAIRS: words of
    two bfloat16 that follow each other along the depth, which counts words."""

    pointer: Value
    columns: int
    storage: str = "float32"


def multiply(e: Emitter, acc: Accumulators, left: Left, right: Right, depth: Value | int,
             unroll: int = 4) -> Accumulators:
    """acc[i][j] + sum over k < depth of left(i, k) * right(k, j-th vector of columns). A run-time
    `depth` must be a multiple of `unroll`."""
    rows, vectors = len(acc), len(acc[0])
    unroll = min(unroll, depth) if isinstance(depth, int) else unroll
    whole = depth - depth % unroll if isinstance(depth, int) else depth
    fma = e.fma if right.storage != PAIRS else partial(_fma_pairs, e)

    def steps(k: Value | int, count: int, flat: Sequence[Value]) -> list[Value]:
        k = i64(k) if isinstance(k, int) else k
        a = e.at(left.pointer, k if left.depth == 1 else e.mul(k, i64(left.depth)), e.real)
        b = e.at(right.pointer, e.mul(k, i64(right.columns)), WORDS[right.storage])
        flat = list(flat)
        for u in range(count):
            line = _line(e, b, right, u * right.columns, vectors)
            for i in range(rows):
                x = e.splat(e.load(a, e.real, i * left.row + u * left.depth))
                for j in range(vectors):
                    at = i * vectors + j
                    flat[at] = fma(x, line[j], flat[at])
        return flat

    flat = [x for row in acc for x in row]
    with e.loop(0, whole, unroll, flat) as loop:
        loop.next = steps(loop.index, unroll, loop.values)
    flat = loop.values
    if isinstance(depth, int) and depth % unroll:
        flat = steps(whole, depth % unroll, flat)
    return [list(flat[i * vectors:(i + 1) * vectors]) for i in range(rows)]


def _line(e: Emitter, b: Value, right: Right, at: int, vectors: int) -> list[Value]:
    """One line of the right operand, as the type computed in."""
    if right.storage == PAIRS:
        return [e.load(b, e.vector, at + j * e.lanes) for j in range(vectors)]
    if right.storage != "bfloat16":
        return [e.load_as(right.storage, b, at + j * e.lanes) for j in range(vectors)]
    line = []
    for j in range(0, vectors, 2):
        pair = e.cast("bitcast", e.load(b, f"<{2 * e.lanes} x i16>", at + j * e.lanes),
                      e.vec("i32"))
        line += [e.op("shl", pair, const(pair.type, 16)),
                 e.and_(pair, const(pair.type, -0x10000))]
    return [e.cast("bitcast", x, e.vector) for x in line]


def _fma_pairs(e: Emitter, x: Value, y: Value, total: Value) -> Value:
    """total + the products of both halves of each word."""
    x, y = (e.cast("bitcast", v, f"<{2 * e.lanes} x bfloat>") for v in (x, y))
    return e.intrinsic("x86.avx512bf16.dpbf16ps.512", total.type, total, x, y)
