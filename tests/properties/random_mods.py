"""Random mods, written as Python source from a table with an entry for every operation.

`mods()` draws sources of score mods; `compiled(source, tables)` makes the function. F, I and B in a
template stand for any float, integer or bool expression.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor

from flexattn.ir.ops import Op

HEADS, QUERIES, KEYS = 8, 12, 20

TEMPLATES: dict[Op, tuple[str, ...]] = {
    Op.INPUT: ("score",),
    Op.NUMBER: ("(0.37 * F)", "(F - 1.5)"),
    Op.CONST: ("torch.where(B, 1.0, 0.5)",),
    Op.LOAD: ("slopes[h]", "grid[h, q_idx, kv_idx]", "table[q_idx - kv_idx + 20]",
              "table[I % 33]", "table[-(abs(I) % 33) - 1]"),
    Op.CAST: ("I.to(score.dtype)", "B.float()", "F.double().to(score.dtype)"),
    Op.SQRT: ("torch.sqrt(F.abs() + 0.1)",),
    Op.RSQRT: ("torch.rsqrt(F.square() + 0.5)",),
    Op.EXP: ("torch.exp(F.clamp(max=3))",),
    Op.EXP2: ("torch.exp2(F.clamp(-9, 4))",),
    Op.EXPM1: ("torch.expm1(F.clamp(max=3))",),
    Op.LOG: ("torch.log(F.abs() + 0.1)",),
    Op.LOG2: ("(F.square() + 1).log2()",),
    Op.LOG1P: ("torch.log1p(F.abs())",),
    Op.SIN: ("torch.sin(F)",),
    Op.COS: ("F.cos()",),
    Op.TANH: ("3 * torch.tanh(F / 3)",),
    Op.SIGMOID: ("torch.sigmoid(F)",),
    Op.ERF: ("torch.erf(F)",),
    Op.FLOOR: ("torch.floor(F)",),
    Op.CEIL: ("F.ceil()",),
    Op.TRUNC: ("torch.trunc(F)",),
    Op.ROUND: ("torch.round(F)",),
    Op.NEG: ("(-F)",),
    Op.ABS: ("F.abs()",),
    Op.SIGN: ("torch.sign(F)",),
    Op.NOT: ("torch.where(~B, F, F)",),
    Op.ADD: ("(F + F)", "(F + 1.25)"),
    Op.SUB: ("(F - F)", "(2 - F)"),
    Op.MUL: ("(F * F)", "(0.5 * F)"),
    Op.DIV: ("(F / (F.square() + 1))", "(F / 8)"),
    Op.FLOORDIV: ("(F // 1.5)",),
    Op.MOD: ("torch.remainder(F, 1.7)",),
    Op.POW: ("(F ** 2)", "((F.abs() + 0.1) ** 1.3)", "(F ** 3)"),
    Op.MIN: ("torch.minimum(F, F)", "torch.clamp(F, max=2)"),
    Op.MAX: ("torch.maximum(F, F)", "torch.clamp(F, min=-2)"),
    Op.WHERE: ("torch.where(B, F, F)", "torch.where(B, F, -0.5)", "F.masked_fill(B, 0.25)"),
}
INTEGERS: dict[Op, tuple[str, ...]] = {
    Op.INPUT: ("q_idx", "kv_idx", "h", "b", "(q_idx - kv_idx)"),
    Op.NUMBER: ("(q_idx * 0 + 3)",),
    Op.LOAD: ("ids[q_idx]", "ids[kv_idx]", "ids[I % 20]"),
    Op.CAST: ("torch.nan_to_num(F).clamp(-99, 99).long()", "B.long()", "I.int()"),
    Op.NEG: ("(-I)",),
    Op.ABS: ("abs(I)",),
    Op.SIGN: ("torch.sign(I)",),
    Op.ADD: ("(I + I)", "(I + 2)"),
    Op.SUB: ("(I - I)",),
    Op.MUL: ("(I * 3)", "((I & 63) * (I & 63))"),
    Op.FLOORDIV: ("(I // 4)", "(I // (abs(I) + 1))"),
    Op.MOD: ("(I % 5)", "(I % 8)"),
    Op.MIN: ("torch.minimum(I, I)",),
    Op.MAX: ("torch.maximum(I, I)", "I.clamp(-3, 9)"),
    Op.AND: ("(I & 7)",),
    Op.OR: ("(I | 4)",),
    Op.XOR: ("(I ^ I)",),
    Op.SHL: ("((I & 15) << (I & 3))",),
    Op.SHR: ("(I >> 1)",),
    Op.NOT: ("(~I)",),
    Op.WHERE: ("torch.where(B, I, I)",),
}
BOOLS: dict[Op, tuple[str, ...]] = {
    Op.LT: ("(F < F)", "(I < I)", "(I > 3)"),
    Op.LE: ("(I <= I)", "(F >= 0.1)"),
    Op.EQ: ("(I == I)", "(ids[q_idx] == ids[kv_idx])"),
    Op.NE: ("(I != 2)",),
    Op.AND: ("(B & B)",),
    Op.OR: ("(B | B)",),
    Op.XOR: ("(B ^ B)",),
    Op.NOT: ("(~B)",),
    Op.CAST: ("(I & 1).bool()",),
}
# What is left out: torch has no derivative of it, or it jumps or grows without a bound.
UNDERIVED = ("F // 1.5",)
ROUGH = (*UNDERIVED, "floor", "ceil", "trunc", "round", "sign(", "remainder", "nan_to_num",
         "F < F", "F >= 0.1", "F ** 3", "** 1.3", "I.to(")

_LEAVES = {"F": ["score", "0.7 * score", "slopes[h]", "grid[h, q_idx, kv_idx]"],
           "I": ["q_idx", "kv_idx", "h", "ids[kv_idx]"], "B": ["(q_idx >= kv_idx)", "(h > 2)"]}


def _choices(without: tuple[str, ...] = ()) -> dict[str, list[str]]:
    tables = {"F": TEMPLATES, "I": INTEGERS, "B": BOOLS}
    return {kind: [text for texts in table.values() for text in texts
                   if not any(word in text for word in without)]
            for kind, table in tables.items()}


_CHOICES = {"any": _choices(), "differentiable": _choices(UNDERIVED), "smooth": _choices(ROUGH)}


@st.composite
def mods(draw: st.DrawFn, kind: str = "any", depth: int = 4) -> str:
    """The source of a score mod's result; kind: any, differentiable (by torch) or smooth."""
    choices = _CHOICES[kind]

    def expression(kind: str, depth: int) -> str:
        options = choices[kind] if depth else _LEAVES[kind]
        return re.sub(r"\b[FIB]\b", lambda found: expression(found[0], depth - 1),
                      draw(st.sampled_from(options)))

    return expression("F", depth)


def bounded(source: str) -> str:
    """The same mod with a result in [-4, 4], never NaN."""
    return f"torch.nan_to_num({source}).clamp(-4, 4)"


def stacked(sources: list[str]) -> str:
    """One mod that is sources[i] in head i."""
    text = "score"
    for i, source in enumerate(sources):
        text = f"torch.where(h == {i}, {source}, {text})"
    return text


def compiled(source: str, tables: dict[str, Tensor]) -> Callable:
    return eval(f"lambda score, b, h, q_idx, kv_idx: {source}", {"torch": torch, **tables})


def random_tables(dtype: torch.dtype, requires_grad: bool = False) -> dict[str, Tensor]:
    floats = {"slopes": torch.randn(HEADS), "grid": torch.randn(HEADS, QUERIES, KEYS),
              "table": torch.randn(33)}
    return {**{name: t.to(dtype).requires_grad_(requires_grad) for name, t in floats.items()},
            "ids": torch.randint(0, 4, (KEYS,))}
