"""How far outputs are from float64, beside those of SDPA and of eager attention in the same dtype.

In: the options of benchmarks.run. Out: rows whose `value` is a relative error in parts of a
million, of the output and of lse, for mods of the library and for random and saturated logits.
SDPA gets a mod as its users write it: a bias tensor of its dtype where the mod only adds, and no
SDPA row where it does more. Its lse is FlashAttention's, and in rows of their own cuDNN's, which
they give without a mod only.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import flexattn
from benchmarks.gpu_cases import HeadShape, causal_mask
from benchmarks.report import Row
from flexattn import masks, mods
from flexattn.reference import attention

_SATURATED = 8.0  # times the query: probabilities near 0 and 1
Mod = Callable[..., Any] | None


@dataclass(frozen=True)
class _Case:
    """adds: the mod is the score plus something that does not depend on it."""

    name: str
    score_mod: Mod
    mask_mod: Mod
    adds: bool = True


def accuracy(options: argparse.Namespace) -> Iterator[Row]:
    """Both head dims, with every kind of mod of the library."""
    for head_dim in options.head_dims:
        shape = HeadShape(1, 8, 8, 1024, 1024, head_dim, torch.bfloat16)
        for case in _cases(shape):
            for logits, factor in (("random", 1.0), ("saturated", _SATURATED)):
                q, k, v = shape.inputs()
                yield from _rows(case, shape, logits, (q * factor, k, v))


def _cases(shape: HeadShape) -> Iterator[_Case]:
    heads, length, device = shape.heads, shape.kv_len, shape.device
    side = int(length**0.5)

    def made(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device=device)

    yield _Case("noop", None, None)
    yield _Case("causal", None, causal_mask)
    yield _Case("sliding window", None, masks.sliding_window(200))
    yield _Case("natten", None, masks.natten((side, side), (7, 7)))
    yield _Case("alibi", mods.alibi(mods.alibi_slopes(heads, device)), causal_mask)
    yield _Case("softcap", mods.softcap(20.0), None, adds=False)
    yield _Case("relative bias", mods.relative_bias(made(2 * length - 1, heads)), None)
    yield _Case("t5", mods.t5_bias(made(32, heads)), None)
    yield _Case("sandwich", mods.sandwich(heads, 64, device=device), None)
    yield _Case("learned bias", mods.learned_bias(made(heads, length, length)), None)
    yield _Case("graphormer spatial", mods.graphormer_spatial(
        made(9, heads), torch.randint(0, 9, (length, length), device=device)), None)
    yield _Case("head bias", mods.head_bias(made(heads)), None)
    yield _Case("temperature", mods.temperature(torch.rand(heads, device=device) + 0.5), None,
                adds=False)


def _rows(case: _Case, shape: HeadShape, logits: str,
          inputs: tuple[Tensor, Tensor, Tensor]) -> Iterator[Row]:
    exact = attention(*inputs, case.score_mod, case.mask_mod, dtype=torch.float64)
    found = {"ours": _ours(case, inputs),
             "eager": attention(*inputs, case.score_mod, case.mask_mod, dtype=shape.dtype)[:2],
             "sdpa": _sdpa(case, shape, inputs), "cudnn": _cudnn(case, inputs)}
    for number, name in enumerate(("out", "lse")):
        errors = {who: _error(tensor, exact[number]) for who, results in found.items()
                  if (tensor := results[number]) is not None}
        for who, error in errors.items():
            yield Row(f"{case.name}, {logits}, {name}", str(shape), "bfloat16", who, error * 1e6,
                      "ppm", ours_is_faster=None if who == "ours" else error / errors["ours"])


def _ours(case: _Case, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
    q_len, kv_len = inputs[0].shape[2], inputs[1].shape[2]
    mask = None if case.mask_mod is None else flexattn.create_block_mask(
        case.mask_mod, None, None, q_len, kv_len, device=inputs[0].device)
    out, aux = flexattn.flex_attention(*inputs, case.score_mod, mask,
                                       return_aux=flexattn.AuxRequest(lse=True))
    return out, aux.lse


def _sdpa(case: _Case, shape: HeadShape, inputs: tuple[Tensor, Tensor, Tensor]
          ) -> tuple[Tensor | None, Tensor | None]:
    if case.score_mod is None and case.mask_mod in (None, causal_mask):
        causal = case.mask_mod is not None
        lse = torch.ops.aten._scaled_dot_product_flash_attention(*inputs, is_causal=causal)[1]
        return F.scaled_dot_product_attention(*inputs, is_causal=causal), lse
    if not case.adds:
        return None, None
    return F.scaled_dot_product_attention(*inputs, attn_mask=_bias(case, shape)), None


def _cudnn(case: _Case, inputs: tuple[Tensor, Tensor, Tensor]
           ) -> tuple[Tensor | None, Tensor | None]:
    if case.score_mod is not None or case.mask_mod not in (None, causal_mask):
        return None, None
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *inputs, None, True, is_causal=case.mask_mod is not None)
    return out, lse.view(out.shape[:3])


def _bias(case: _Case, shape: HeadShape) -> Tensor:
    """[1, H, Q, KV] of what the mod adds, -inf where it is masked."""
    zero = torch.zeros((), dtype=torch.int64, device=shape.device)
    h, q_idx, kv_idx = (torch.arange(n, device=shape.device).view(view) for n, view in (
        (shape.heads, (1, -1, 1, 1)), (shape.q_len, (1, 1, -1, 1)), (shape.kv_len, (1, 1, 1, -1))))
    whole = (1, shape.heads, shape.q_len, shape.kv_len)
    bias = torch.zeros(whole, device=shape.device)
    if case.score_mod is not None:
        bias = case.score_mod(bias, zero, h, q_idx, kv_idx)
    if case.mask_mod is not None:
        keep = case.mask_mod(zero, h, q_idx, kv_idx).expand(whole)
        bias = bias.masked_fill(~keep, float("-inf"))
    return bias.expand(whole).to(shape.dtype)


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())
