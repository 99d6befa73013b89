"""Random sparse attention over blocks of tokens (BigBird).

The random blocks are drawn once, when the mask is made, from `seed`, into a table of
num_blocks x num_random numbers: memory is linear in the length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexattn.errors import ArgumentError, message
from flexattn.masks.arguments import Index, MaskMod, integer


def random_blocks(length: int, block: int, num_random: int, seed: int = 0,
                  device: torch.device | str | None = None) -> MaskMod:
    """Each block of queries attends `num_random` different blocks of keys, drawn uniformly.

    `kv_idx // block in table[q_idx // block]`, table int32 [ceil(length / block), num_random] on
    `device` (that of the query). The same for all batch entries and heads; the same on all devices.

    Errors: ArgumentError if there are fewer blocks than `num_random`.
    """
    block = integer("block", block, at_least=1)
    blocks = -(-integer("length", length, at_least=1) // block)
    num_random = integer("num_random", num_random, at_least=1)
    if num_random > blocks:
        raise ArgumentError(message("more random blocks than there are blocks",
                                    expected=f"at most {blocks}", got=str(num_random)))
    device = torch.get_default_device() if device is None else device
    columns = _draw(blocks, num_random, seed).to(device=device, dtype=torch.int32).unbind(1)

    def mask(b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Tensor:
        q_block, kv_block = q_idx // block, kv_idx // block
        chosen = columns[0][q_block] == kv_block
        for column in columns[1:]:
            chosen = chosen | (column[q_block] == kv_block)
        return chosen

    return mask


def bigbird(length: int, block: int, num_random: int = 3, window_blocks: int = 1,
            global_blocks: int = 1, seed: int = 0,
            device: torch.device | str | None = None) -> MaskMod:
    """Blocks that are near, global or drawn at random; i and j the blocks of query and key.

    `|i - j| <= window_blocks or i < global_blocks or j < global_blocks or j in table[i]`, table as
    in `random_blocks`. A random block may coincide with a near or global one.

    Errors: as `random_blocks`.
    Source: BigBird, Zaheer et al. 2020, https://arxiv.org/abs/2007.14062, internal construction.
    Example: `bigbird(4096, 64)` reads 3 near, 3 random and 1 global block per block of queries.
    """
    drawn = random_blocks(length, block, num_random, seed, device)
    window_blocks = integer("window_blocks", window_blocks)
    global_tokens = integer("global_blocks", global_blocks) * block

    def mask(b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Tensor:
        ahead = q_idx // block - kv_idx // block
        near = (ahead <= window_blocks) & (-ahead <= window_blocks)
        is_global = (q_idx < global_tokens) | (kv_idx < global_tokens)
        return near | is_global | drawn(b, h, q_idx, kv_idx)

    return mask


def _draw(blocks: int, count: int, seed: int) -> Tensor:
    """`count` different numbers below `blocks` in each of `blocks` rows (Floyd's algorithm)."""
    generator = torch.Generator("cpu").manual_seed(seed)
    table = torch.full((blocks, count), -1, device="cpu")
    for column, largest in enumerate(range(blocks - count, blocks)):
        drawn = torch.randint(largest + 1, (blocks,), generator=generator, device="cpu")
        taken = (table == drawn[:, None]).any(1)
        table[:, column] = torch.where(taken, largest, drawn)
    return table
