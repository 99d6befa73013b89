"""BlockMask: which blocks of Q x KV attention has to touch, and create_block_mask."""

from flexattn.block_mask.create import create_block_mask, create_mask
from flexattn.block_mask.mask import BlockMask
from flexattn.block_mask.tree import register

register(BlockMask)

__all__ = ["BlockMask", "create_block_mask", "create_mask"]
