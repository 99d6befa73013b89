"""What `flexattn demo` shows: a few variants, each checked against the dense formula.

In: a length. Out: `Stop`s: a title, the code that defines the variant, what came of it.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flexattn import create_block_mask, flex_attention, reference
from flexattn.pictures import block_cells, text


@dataclass(frozen=True)
class Stop:
    """One thing to see."""

    title: str
    source: str
    shown: str
    error: float


def causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return q_idx >= kv_idx


def documents(lengths: list[int]) -> Callable:
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))

    def packed(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (document[q_idx] == document[kv_idx]) & (q_idx >= kv_idx)

    return packed


def softcap(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return 20 * torch.tanh(score / 20)


def learned_bias(bias: Tensor) -> Callable:
    length = bias.shape[1] // 2

    def by_distance(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + bias[h, q_idx - kv_idx + length]

    return by_distance


def stops(length: int) -> Iterator[Stop]:
    """Three masks or mods, then one whose captured tensor is trained."""
    third = length // 3
    packed = documents([third, third, length - 2 * third])
    yield _stop("a causal mask", causal, causal, None, length)
    yield _stop("documents packed into one sequence", documents, packed, None, length)
    yield _stop("soft-capped scores", softcap, causal, softcap, length)
    yield _trained(length)


def _stop(title: str, shown: Callable, mask: Callable, mod: Callable | None, length: int) -> Stop:
    query, key, value = torch.randn(3, 1, 4, length, 64)
    block_mask = create_block_mask(mask, None, None, length, length)
    flex_attention(query, key, value, mod, block_mask)
    start = time.perf_counter()
    out = flex_attention(query, key, value, mod, block_mask)
    taken = 1e3 * (time.perf_counter() - start)
    error = float((out - reference.attention(query, key, value, mod, mask)[0]).abs().max())
    cells = block_cells(block_mask.rows(), length, length, limit=(16, 16))
    return Stop(title, inspect.getsource(shown), f"{text(cells)}\n{taken:.2f} ms, largest "
                f"difference from the formula {error:.0e}", error)


def _trained(length: int) -> Stop:
    """Gradients of whatever a mod captures."""
    query, key, value = torch.randn(3, 1, 4, length, 64)
    bias = torch.zeros(4, 2 * length, requires_grad=True)
    mod = learned_bias(bias)
    out = flex_attention(query, key, value, mod)
    got, = torch.autograd.grad(out.square().sum(), bias)
    dense = reference.attention(query, key, value, mod)[0]
    wanted, = torch.autograd.grad(dense.square().sum(), bias)
    error = float((got - wanted).abs().max())
    return Stop("a learned bias of every head and distance", inspect.getsource(learned_bias),
                f"gradient of {bias.numel()} numbers, largest difference from autograd's through "
                f"the dense formula {error:.0e}", error)
