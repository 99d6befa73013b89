"""Mask mods made of mask mods: of a slice, of blocks, of both, either or neither.

In: mask mods. Out: mask mods, plain functions of traced scalars.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from flexattn.analysis.runs import EMPTY, FULL
from flexattn.block_mask.arguments import MaskMod


def sliced(mask_mod: MaskMod, picked: list[Tensor], block: int, device: Any) -> MaskMod:
    """mask_mod of a slice: `picked` are the batch entries, heads and rows of blocks it takes."""
    batch, heads = (_lookup(p, 1, device) for p in picked[:2])
    query = _lookup(picked[2], block, device)

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return mask_mod(batch(b), heads(h), query(q_idx), kv_idx)

    return mask


def _lookup(picked: Tensor, block: int, device: Any) -> Callable[[Any], Any]:
    """Where an index was before: a shift where neighbours stayed neighbours, else read."""
    first = int(picked[0]) if len(picked) else 0
    if bool((picked.diff() == 1).all()):
        return (lambda i: i + first * block) if first else (lambda i: i)
    table = picked.to(device)
    return lambda i: table[i // block] * block + i % block


def inside_blocks(mask_mod: MaskMod | None, kinds: Tensor, block_size: tuple[int, int]) -> MaskMod:
    """What a kernel attends that follows blocks of `kinds` uint8 [B, H, rows, columns]: nothing in
    empty ones, everything in full ones, mask_mod (None: everything) in partial ones."""
    q_block, kv_block = block_size
    one_batch, one_head = (n == 1 for n in kinds.shape[:2])

    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        kind = kinds[0 if one_batch else b, 0 if one_head else h, q_idx // q_block,
                     kv_idx // kv_block]
        if mask_mod is None:
            return kind != EMPTY
        return (kind == FULL) | ((kind != EMPTY) & mask_mod(b, h, q_idx, kv_idx))

    return mask


def negated(mask_mod: MaskMod) -> MaskMod:
    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return ~mask_mod(b, h, q_idx, kv_idx)

    return mask


def joined(first: MaskMod, second: MaskMod, either: bool) -> MaskMod:
    """Attended where either attends, or where both do."""
    def mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        x, y = first(b, h, q_idx, kv_idx), second(b, h, q_idx, kv_idx)
        return x | y if either else x & y

    return mask
