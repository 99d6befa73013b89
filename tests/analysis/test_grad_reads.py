"""Kinds of reads: those of the mods in use, and that a kind never lies, on random indices."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexattn.analysis.grad_reads import COLUMN, DIAGONAL, ROW, SCATTERED, kinds
from flexattn.analysis.gradient import gradient
from flexattn.ir.evaluate import evaluate
from flexattn.ir.graph import Graph, Node, cast, const, index_input, node
from flexattn.ir.ops import Op
from flexattn.trace import specialize, trace_score_mod

table = torch.randn(40, 4, requires_grad=True)
bucket = torch.randint(0, 40, (65,))


@pytest.mark.parametrize("index, expected", [
    (lambda b, h, q, k: (0, h), ROW),
    (lambda b, h, q, k: (b, h), ROW),
    (lambda b, h, q, k: (q, 0), ROW),
    (lambda b, h, q, k: (k, h), COLUMN),
    (lambda b, h, q, k: (bucket[k], h), COLUMN),
    (lambda b, h, q, k: (q - k + 32, h), DIAGONAL),
    (lambda b, h, q, k: (32 + 2 * k - q * 2, 1), DIAGONAL),
    (lambda b, h, q, k: (torch.clamp(k - q, -8, 8) + 8, h), DIAGONAL),
    (lambda b, h, q, k: (bucket[torch.clamp(k - q, -32, 32) + 32], h), DIAGONAL),
    (lambda b, h, q, k: (torch.abs(q - k), h), DIAGONAL),
    (lambda b, h, q, k: ((q + 5) - (k - 3), (q - k) // 16), DIAGONAL),
    (lambda b, h, q, k: (q // 4 - k // 4 + 16, h), SCATTERED),
    (lambda b, h, q, k: (q - k + h, q % 4), SCATTERED),
    (lambda b, h, q, k: (q, k), SCATTERED),
    (lambda b, h, q, k: (q + k, h), SCATTERED),
])
def test_kind(index: Callable[..., tuple], expected: str) -> None:
    def mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score + table[index(b, h, q, k)]

    graph = specialize(trace_score_mod(mod, torch.float32, torch.device("cpu"))).graph
    assert kinds(gradient(graph).loads) == (expected,)


def test_each_read_has_a_kind() -> None:
    def mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score * table[0, h] + table[q, h] + table[k, h] + table[q - k, h]

    graph = specialize(trace_score_mod(mod, torch.float32, torch.device("cpu"))).graph
    assert sorted(kinds(gradient(graph).loads)) == sorted([ROW, ROW, COLUMN, DIAGONAL])


def test_index_by_score_is_scattered() -> None:
    score = node(Op.INPUT, dtype=torch.float32, attr="score")
    load = node(Op.LOAD, cast(score, torch.int64), dtype=torch.float32, attr=0)
    assert kinds([load]) == (SCATTERED,)


def test_scalar_is_a_row_sum() -> None:
    assert kinds([node(Op.LOAD, dtype=torch.float32, attr=0)]) == (ROW,)


def _binary(op: Op) -> Callable[[Node, Node], Node]:
    return lambda x, y: node(op, x, y, dtype=torch.int64)


leaves = st.sampled_from([index_input(name) for name in ("b", "h", "q_idx", "kv_idx", "q_idx")]
                         + [const(value, torch.int64) for value in (-3, 0, 2, 5)])
binary = st.sampled_from([_binary(op) for op in (Op.ADD, Op.SUB, Op.SUB, Op.MUL, Op.MIN, Op.MAX,
                                                 Op.FLOORDIV, Op.MOD, Op.XOR)])
unary = st.sampled_from([lambda x: node(Op.NEG, x, dtype=torch.int64),
                         lambda x: node(Op.ABS, x, dtype=torch.int64),
                         lambda x: cast(cast(x, torch.int8), torch.int64)])
indices = st.recursive(
    leaves, lambda inner: st.builds(lambda f, x, y: f(x, y), binary, inner, inner)
    | st.builds(lambda f, x: f(x), unary, inner), max_leaves=8)


@settings(deadline=None, max_examples=300)
@given(indices)
def test_a_kind_is_a_proof(index: Node) -> None:
    kind = kinds([node(Op.LOAD, index, dtype=torch.float32, attr=0)])[0]
    n = 6
    inputs = {"b": torch.tensor(1), "h": torch.tensor(3), "q_idx": torch.arange(n)[:, None],
              "kv_idx": torch.arange(n)[None]}
    value = evaluate(Graph((("index", index),)), inputs)["index"].expand(n, n)
    for (i, j), (k, m) in product(product(range(n), repeat=2), repeat=2):
        same = {ROW: i == k, COLUMN: j == m, DIAGONAL: i - j == k - m, SCATTERED: False}[kind]
        assert not same or value[i, j] == value[k, m]
