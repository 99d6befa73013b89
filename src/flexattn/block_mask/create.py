"""create_block_mask and create_mask: from a mask mod `(b, h, q_idx, kv_idx) -> bool` and sizes.

Rejects sizes and block sizes that make no sense (ArgumentError), and what the tracer rejects.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexattn.analysis.block_sparsity import element_mask, grid_of, mask_runs
from flexattn.analysis.runs import RunTable, all_partial
from flexattn.block_mask.arguments import (
    BlockSize,
    MaskMod,
    check_options,
    checked_block_size,
    checked_size,
    device_of,
)
from flexattn.block_mask.bounded import bounded_runs
from flexattn.block_mask.mask import BlockMask
from flexattn.dynamo import with_mods
from flexattn.trace import specialize, trace_mask_mod


def create_block_mask(mask_mod: MaskMod, B: int | None, H: int | None, Q_LEN: int, KV_LEN: int,
                      device: torch.device | str | None = None, BLOCK_SIZE: BlockSize = 128,
                      _compile: bool = False, separate_full_blocks: bool = True,
                      *, max_runs: int | None = None, **torch_options: Any) -> BlockMask:
    """The block mask of `mask_mod`, proved from its expression: elements are only looked at where
    the proof fails.

    Args:
        mask_mod: `(b, h, q_idx, kv_idx) -> bool`, True where attended.
        B, H: batch size and number of query heads; None or 1 for any.
        Q_LEN, KV_LEN: lengths in tokens.
        device: where the mask's tables live (default: torch's default device).
        BLOCK_SIZE: tokens per block, one int or (q, kv).
        separate_full_blocks: False marks full blocks as partial.
        max_runs: room for so many runs, neighbouring blocks of one kind in a row (causal has two a
            row). On a GPU nothing then waits for the device, so that the mask can be made in a
            CUDA graph; one with more runs is an error in the next call that can know of it.
        _compile and further options of PyTorch's function are accepted and change nothing.

    Raises: ArgumentError for sizes that are negative, for unknown options, for more runs than
        max_runs, and with it for a mask that a GPU has to wait for; the tracer's errors for a wrong
        mask_mod.

    Examples:
        >>> create_block_mask(lambda b, h, q_idx, kv_idx: q_idx >= kv_idx, None, None, 512, 512)
        BlockMask(shape=(1, 1, 512, 512), BLOCK_SIZE=(128, 128), sparsity=37.50%)
    """
    check_options("create_block_mask", torch_options)
    batch, heads, Q_LEN, KV_LEN = _sizes("create_block_mask", B, H, Q_LEN, KV_LEN)
    if max_runs is not None:
        max_runs = checked_size("create_block_mask", "max_runs", max_runs)
    blocks, where = checked_block_size(BLOCK_SIZE), device_of(device)
    if torch.compiler.is_compiling():
        return _in_a_graph(mask_mod, (batch, heads, Q_LEN, KV_LEN), blocks, where,
                           separate_full_blocks, max_runs)
    mod = specialize(trace_mask_mod(mask_mod, where))
    grid = grid_of(mod, batch, heads, Q_LEN, KV_LEN, *blocks)
    if max_runs is not None:
        table = bounded_runs(mod, grid, where, max_runs, separate_full_blocks)
    else:
        table = mask_runs(mod, grid, where)
        if not separate_full_blocks:
            table = all_partial(table, grid.columns)
    return BlockMask(table, (Q_LEN, KV_LEN), (batch, heads), mask_mod, proved=True,
                     separate_full_blocks=separate_full_blocks)


def _sizes(function: str, B: Any, H: Any, Q_LEN: Any, KV_LEN: Any) -> tuple[int, int, int, int]:
    """Batch, heads and lengths, checked."""
    batch, heads = 1 if B is None else B, 1 if H is None else H
    return (checked_size(function, "B", batch), checked_size(function, "H", heads),
            checked_size(function, "Q_LEN", Q_LEN), checked_size(function, "KV_LEN", KV_LEN))


def _in_a_graph(mask_mod: MaskMod, shape: tuple[int, int, int, int], blocks: tuple[int, int],
                device: torch.device, separate_full_blocks: bool, max_runs: int | None
                ) -> BlockMask:
    """The block mask of a graph that is being compiled: its number of runs is not known yet."""
    offsets, start, end, full, images, runs = with_mods(
        "block_runs", torch.empty((), device=device), torch.float32, None, mask_mod, *shape,
        *blocks, separate_full_blocks, -1 if max_runs is None else max_runs, device)
    rows = -(-shape[2] // blocks[0])
    table = RunTable(offsets, start, end, full, images.shape[0], images.shape[1], rows, *blocks,
                     None if max_runs is None else runs)
    return BlockMask(table, (shape[2], shape[3]), (shape[0], shape[1]), mask_mod, proved=True,
                     separate_full_blocks=separate_full_blocks)


def create_mask(mask_mod: MaskMod, B: int | None, H: int | None, Q_LEN: int, KV_LEN: int,
                device: torch.device | str | None = None) -> Tensor:
    """The dense mask, bool [B, H, Q_LEN, KV_LEN]: for small sizes, tests and pictures."""
    batch, heads, Q_LEN, KV_LEN = _sizes("create_mask", B, H, Q_LEN, KV_LEN)
    where = device_of(device)
    mod = specialize(trace_mask_mod(mask_mod, where))
    found = torch.empty(batch, heads, Q_LEN, KV_LEN, dtype=torch.bool, device=where)
    for b in range(batch):
        for h in range(heads):
            found[b, h] = element_mask(mod, b, h, (0, Q_LEN), KV_LEN, where)
    return found
