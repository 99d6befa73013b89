"""The cases of the GPU tests: mods x masks x dtypes x head dims x heads x lengths, by pairwise
cover, each with fresh inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor

DIMENSIONS: dict[str, tuple[Any, ...]] = {
    "mod": ("none", "softcap", "alibi", "relative_bias", "pair_bias", "buckets"),
    "mask": ("none", "causal", "window", "documents", "scattered"),
    "dtype": (torch.bfloat16, torch.float16, torch.float32),
    "dims": ((64, 64), (128, 128), (96, 96), (16, 40), (192, 128), (256, 256)),
    "heads": ((4, 4), (6, 2), (8, 1)),
    "lengths": ((256, 256), (333, 517), (1000, 1000), (700, 65)),
}


@dataclass
class Mods:
    """A score mod and a mask mod; `trained` are captured tensors that want gradients."""

    score_mod: Callable[..., Any] | None = None
    mask_mod: Callable[..., Any] | None = None
    trained: list[Tensor] = field(default_factory=list)


def pairwise() -> list[dict[str, Any]]:
    """Few cases in which every pair of values of two dimensions occurs."""
    names = list(DIMENSIONS)
    missing = {(a, x, b, y) for a, b in combinations(names, 2)
               for x, y in product(DIMENSIONS[a], DIMENSIONS[b])}
    chosen = []
    while missing:
        a, x, b, y = min(missing, key=repr)
        case = {a: x, b: y}
        for name in names:
            if name not in case:
                case[name] = max(DIMENSIONS[name], key=lambda v: sum(
                    pair in missing for pair in _pairs({**case, name: v})))
        missing -= set(_pairs(case))
        chosen.append({name: case[name] for name in names})
    return chosen


def _pairs(case: dict[str, Any]) -> list[tuple]:
    order = [n for n in DIMENSIONS if n in case]
    return [(a, case[a], b, case[b]) for a, b in combinations(order, 2)]


def mods(mod: str, mask: str, heads: int, lengths: tuple[int, int]) -> Mods:
    """Fresh captured tensors, and functions that read them."""
    q_len, kv_len = lengths
    found = Mods()
    _score(found, mod, heads, q_len, kv_len)
    _mask(found, mask, q_len, kv_len)
    return found


def _trained(found: Mods, *shape: int) -> Tensor:
    tensor = torch.randn(*shape, device="cuda", requires_grad=True)
    found.trained.append(tensor)
    return tensor


def _score(found: Mods, mod: str, heads: int, q_len: int, kv_len: int) -> None:
    if mod == "softcap":
        found.score_mod = lambda score, b, h, q_idx, kv_idx: 5 * torch.tanh(score / 5)
    elif mod == "alibi":
        slopes = _trained(found, heads)
        found.score_mod = lambda score, b, h, q_idx, kv_idx: (
            score + slopes[h] * (q_idx - kv_idx).abs() / 64)
    elif mod == "relative_bias":
        table = _trained(found, heads, q_len + kv_len)
        found.score_mod = lambda score, b, h, q_idx, kv_idx: (
            score + table[h, q_idx - kv_idx + kv_len])
    elif mod == "pair_bias":
        pair, column = _trained(found, q_len, kv_len), _trained(found, kv_len)
        found.score_mod = lambda score, b, h, q_idx, kv_idx: (
            score * column[kv_idx] + pair[q_idx, kv_idx])
    elif mod == "buckets":
        table = _trained(found, 40, heads)
        found.score_mod = lambda score, b, h, q_idx, kv_idx: score + table[
            torch.log2((q_idx - kv_idx).abs().float() + 1).mul(3).to(torch.int64).clamp(max=39), h]


def _mask(found: Mods, mask: str, q_len: int, kv_len: int) -> None:
    if mask == "causal":
        found.mask_mod = lambda b, h, q_idx, kv_idx: q_idx >= kv_idx
    elif mask == "window":
        found.mask_mod = lambda b, h, q_idx, kv_idx: (q_idx - kv_idx).abs() <= 70
    elif mask == "documents":
        ids = torch.sort(torch.randint(0, 5, (2, max(q_len, kv_len)), device="cuda")).values
        found.mask_mod = lambda b, h, q_idx, kv_idx: ids[b, q_idx] == ids[b, kv_idx]
    elif mask == "scattered":
        found.mask_mod = lambda b, h, q_idx, kv_idx: (q_idx * 7 + kv_idx * 5 + h) % 11 < 4


def name(case: dict[str, Any]) -> str:
    return "-".join(str(v).removeprefix("torch.").replace(" ", "") for v in case.values())
