"""BlockMask: which blocks of Q x KV attention has to touch, and create_block_mask."""

from flexattn.block_mask.create import create_block_mask, create_mask
from flexattn.block_mask.mask import BlockMask
from flexattn.block_mask.settled import SettledMask, UndividedMask, settled, undivided
from flexattn.block_mask.tree import register

for _kind in (BlockMask, SettledMask, UndividedMask):
    register(_kind)

__all__ = ["BlockMask", "UndividedMask", "create_block_mask", "create_mask", "settled", "undivided"]
