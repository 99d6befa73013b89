"""Evaluate a graph on tensors: the meaning that every kernel is compared with.

In: a graph, its inputs as broadcastable tensors, captured tensors, run-time numbers. Out: the
named outputs, broadcast together. Bit for bit what eager torch computes for the mod.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from flexattn.ir.graph import Graph, Node
from flexattn.ir.ops import Op

OutOfRange = Callable[[Node, int, Tensor, int], None]



def _plain(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda n, *args: op(*args)


def _integer_safe(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Division that never traps: an integer divisor 0 is replaced by 1."""

    def divide(n: Node, x: Tensor, y: Tensor) -> Tensor:
        return op(x, y if y.dtype.is_floating_point else torch.where(y == 0, 1, y).to(y.dtype))

    return divide


TABLE: dict[Op, Callable[..., Tensor]] = {
    Op.CAST: lambda n, x: x.to(n.dtype),
    Op.SQRT: _plain(torch.sqrt),
    Op.RSQRT: _plain(torch.rsqrt),
    Op.EXP: _plain(torch.exp),
    Op.EXP2: _plain(torch.exp2),
    Op.EXPM1: _plain(torch.expm1),
    Op.LOG: _plain(torch.log),
    Op.LOG2: _plain(torch.log2),
    Op.LOG1P: _plain(torch.log1p),
    Op.SIN: _plain(torch.sin),
    Op.COS: _plain(torch.cos),
    Op.TANH: _plain(torch.tanh),
    Op.SIGMOID: _plain(torch.sigmoid),
    Op.ERF: _plain(torch.erf),
    Op.FLOOR: _plain(torch.floor),
    Op.CEIL: _plain(torch.ceil),
    Op.TRUNC: _plain(torch.trunc),
    Op.ROUND: _plain(torch.round),
    Op.NEG: _plain(torch.neg),
    Op.ABS: _plain(torch.abs),
    Op.SIGN: _plain(torch.sign),
    Op.NOT: _plain(torch.bitwise_not),
    Op.ADD: _plain(torch.add),
    Op.SUB: _plain(torch.sub),
    Op.MUL: _plain(torch.mul),
    Op.DIV: _plain(torch.div),
    Op.FLOORDIV: _integer_safe(torch.floor_divide),
    Op.MOD: _integer_safe(torch.remainder),
    Op.POW: lambda n, x, y: _power(n, x, y),
    Op.MIN: _plain(torch.minimum),
    Op.MAX: _plain(torch.maximum),
    Op.AND: _plain(torch.bitwise_and),
    Op.OR: _plain(torch.bitwise_or),
    Op.XOR: _plain(torch.bitwise_xor),
    Op.SHL: _plain(torch.bitwise_left_shift),
    Op.SHR: _plain(torch.bitwise_right_shift),
    Op.LT: _plain(torch.lt),
    Op.LE: _plain(torch.le),
    Op.EQ: _plain(torch.eq),
    Op.NE: _plain(torch.ne),
    Op.WHERE: _plain(torch.where),
}


def evaluate(
    graph: Graph,
    inputs: Mapping[str, Tensor],
    captures: Sequence[Tensor] = (),
    numbers: Sequence[bool | int | float] = (),
    on_out_of_range: OutOfRange | None = None,
) -> dict[str, Tensor]:
    """The outputs of `graph`, in the broadcast shape of whatever inputs each depends on.

    on_out_of_range(load, dimension, index, size) is called for every LOAD with an index outside
    [-size, size); without it such an index is clamped silently.
    """
    device = next(iter(inputs.values())).device if inputs else None
    values: dict[Node, Tensor] = {}
    for n in graph.nodes:
        if n.op is Op.INPUT:
            values[n] = inputs[n.attr]
        elif n.op is Op.CONST:
            values[n] = torch.tensor(n.attr, dtype=n.dtype, device=device)
        elif n.op is Op.NUMBER:
            values[n] = torch.tensor(numbers[n.attr], dtype=n.dtype, device=device)
        elif n.op is Op.LOAD:
            values[n] = _load(n, captures[n.attr], [values[a] for a in n.args], on_out_of_range)
        else:
            values[n] = TABLE[n.op](n, *(values[a] for a in n.args))
    return {name: values[n] for name, n in graph.outputs}


def _load(n: Node, tensor: Tensor, indices: list[Tensor], report: OutOfRange | None) -> Tensor:
    safe = []
    for dim, (index, size) in enumerate(zip(indices, tensor.shape, strict=True)):
        if report is not None and bool(((index < -size) | (index >= size)).any()):
            report(n, dim, index, size)
        safe.append(torch.where(index < 0, index + size, index).clamp(0, size - 1))
    if tensor.numel() == 0 and indices:
        return tensor.new_zeros(torch.broadcast_shapes(*(i.shape for i in indices)))
    return tensor[tuple(safe)] if safe else tensor


def _power(n: Node, x: Tensor, y: Tensor) -> Tensor:
    """torch.pow, which treats some constant exponents by themselves (x ** 0.5 is a square root);
    a negative integer exponent of an integer truncates towards zero instead of raising."""
    if x.dtype.is_floating_point:
        return torch.pow(x, n.args[1].attr if n.args[1].is_const else y)
    positive = torch.pow(x, y.clamp(min=0))
    inverse = torch.where(x == 1, 1, torch.where(x == -1, 1 - 2 * (y & 1), 0)).to(x.dtype)
    return torch.where(y < 0, inverse, positive)
