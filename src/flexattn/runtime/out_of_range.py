"""What a kernel reports when a mod reads a captured tensor out of range at an attended position.

In: the mod and the words its kernel left: a count, then b, h, q_idx, kv_idx and the score's bits.
The graph is evaluated at that position once more, to name tensor, index and range.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import pack, unpack

import torch
from torch import Tensor

from flexattn.errors import IndexOutOfRangeError, message
from flexattn.ir.evaluate import evaluate
from flexattn.ir.graph import Node
from flexattn.trace import Mod


def raise_out_of_range(mod: Mod, words: Sequence[int]) -> None:
    """Raises IndexOutOfRangeError where words[0] is not zero."""
    if not words[0]:
        return
    names = ("b", "h", "q_idx", "kv_idx")
    position = dict(zip(names, words[1:5], strict=True))
    inputs = {name: torch.tensor(value) for name, value in position.items()}
    for n in mod.graph.nodes:
        if n.attr == "score" and "score" in mod.graph.inputs():
            inputs["score"] = torch.tensor(unpack("d", pack("q", words[5]))[0], dtype=n.dtype)
    where = ", ".join(f"{name}={value}" for name, value in position.items())

    def report(load: Node, dim: int, index: Tensor, size: int) -> None:
        shape = tuple(mod.captures[load.attr].shape)
        raise IndexOutOfRangeError(message(
            f"a mod reads captured tensor {load.attr} (shape {shape}) out of range at {where}",
            expected=f"an index in [{-size}, {size}) in dimension {dim}",
            got=str(int(index)),
            remedy="mask such positions out, or clamp the index in the mod"))

    evaluate(mod.graph, inputs, mod.captures, mod.numbers, report)
    raise AssertionError(f"the kernel saw an index out of range at {where}, the graph does not")
