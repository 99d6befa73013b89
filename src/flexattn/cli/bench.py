"""What `flexattn bench` measures: a few cases, ours against scaled_dot_product_attention.

In: sizes. Out: one `Timing` a case, taken in turns. torch's attention gets the mask as a dense
tensor, and does without where it cannot express a score mod.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flexattn import create_block_mask, create_mask, flex_attention
from flexattn.masks import and_masks, causal, causal_document, sliding_window
from flexattn.mods import alibi, alibi_slopes, softcap


@dataclass(frozen=True)
class Size:
    """Of the inputs of all cases."""

    batch: int = 1
    heads: int = 8
    length: int = 1024
    head_dim: int = 64
    dtype: str = "float32"
    device: str = "cpu"


@dataclass(frozen=True)
class Timing:
    """Median milliseconds; sdpa is None where torch's attention has no such case."""

    case: str
    step: str
    flexattn: float
    sdpa: float | None

    @property
    def ratio(self) -> float | None:
        return None if self.sdpa is None else self.sdpa / self.flexattn


Case = tuple[Callable | None, Callable | None]  # mask_mod, score_mod


def cases(size: Size) -> dict[str, Case]:
    """Name -> mask and score mod."""
    window = max(size.length // 8, 1)
    documents = torch.arange(size.length, device=size.device) // max(size.length // 6, 1)
    slopes = alibi_slopes(size.heads).to(size.device)
    return {
        "full": (None, None),
        "causal": (causal, None),
        f"causal, window {window}": (and_masks(causal, sliding_window(window)), None),
        "causal, documents": (causal_document(documents), None),
        "causal, softcap": (causal, softcap(20.0)),
        "causal, ALiBi": (causal, alibi(slopes)),
    }


def measure(size: Size, rounds: int = 5) -> Iterator[Timing]:
    """Every case, forward and forward with backward."""
    for name, case in cases(size).items():
        for step in ("forward", "training"):
            yield _time(name, case, step, size, rounds)


def _time(name: str, case: Case, step: str, size: Size, rounds: int) -> Timing:
    mask, score = case
    shape = (size.batch, size.heads, size.length, size.head_dim)
    query, key, value = tensors = [
        torch.randn(shape, dtype=getattr(torch, size.dtype), device=size.device,
                    requires_grad=step == "training") for _ in range(3)]
    square = (None, None, size.length, size.length, size.device)
    block_mask = create_block_mask(mask, *square) if mask else None
    ways = [lambda: flex_attention(query, key, value, score, block_mask)]
    if score is None:
        dense = create_mask(mask, *square) if mask and mask is not causal else None
        ways.append(lambda: torch.nn.functional.scaled_dot_product_attention(
            query, key, value, dense, is_causal=mask is causal))
    runs = [_step(way, tensors, step) for way in ways]
    times = _medians(runs, rounds, size.device)
    return Timing(name, step, times[0], times[1] if len(times) > 1 else None)


def _step(way: Callable[[], Tensor], tensors: list[Tensor], step: str) -> Callable[[], object]:
    if step == "forward":
        return way
    d_out = torch.randn_like(tensors[0])
    return lambda: torch.autograd.grad(way(), tensors, d_out)


def _medians(runs: list[Callable[[], object]], rounds: int, device: str) -> list[float]:
    """Median milliseconds of each, in turns, after one call to warm up."""
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(rounds + 1):
        for run, kept in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            if device != "cpu":
                torch.cuda.synchronize()
            if turn:
                kept.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(kept) for kept in times]
