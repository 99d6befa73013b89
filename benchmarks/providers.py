"""The providers: ways to run one case. Each makes a function of (query, key, value), ready to be
timed: masks, block masks and compiled code exist before the clock starts.

A provider returns None where it cannot run the case (torch flex has no backward on a CPU).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex

import flexattn
from benchmarks.cases import Attention, Case

Provider = Callable[[Case, bool], Attention | None]


def _flex(case: Case, attention: Callable[..., Any], create_block_mask: Callable[..., Any],
          **options: Any) -> Attention:
    s = case.shape
    block_mask = None
    if case.mask_mod is not None:
        block_mask = create_block_mask(case.mask_mod, None, None, s.q_len, s.kv_len,
                                       device=s.device)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, score_mod=case.score_mod, block_mask=block_mask,
                         enable_gqa=s.grouped, **options)
    return run


def ours(case: Case, backward: bool) -> Attention | None:
    return _flex(case, flexattn.flex_attention, flexattn.create_block_mask)


def torch_flex_compiled(case: Case, backward: bool, **options: Any) -> Attention | None:
    """torch.compile(flex_attention); compiled for this case alone, as fast as it gets."""
    if case.shape.device == "cpu" and backward:
        return None
    torch.compiler.reset()
    compiled = torch.compile(torch_flex.flex_attention, dynamic=False)
    return _flex(case, compiled, torch_flex.create_block_mask, **options)


def torch_flex_eager(case: Case, backward: bool) -> Attention | None:
    """flex_attention without torch.compile, which writes out the whole score matrix."""
    if case.shape.device == "cpu" and backward:
        return None
    warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
    return _flex(case, torch_flex.flex_attention, torch_flex.create_block_mask)


def sdpa(case: Case, backward: bool) -> Attention | None:
    return case.sdpa


PROVIDERS: dict[str, Provider] = {
    "ours": ours,
    "torch_flex": torch_flex_compiled,
    "sdpa": sdpa,
    "eager": torch_flex_eager,
}
