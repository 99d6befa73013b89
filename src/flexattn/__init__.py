"""flexattn: any attention variant in a few lines of Python, at the speed of a fused kernel."""

from flexattn import masks, mods, reference
from flexattn.attention import AuxOutput, AuxRequest, flex_attention
from flexattn.block_mask import BlockMask, create_block_mask, create_mask
from flexattn.masks.compose import and_masks, noop_mask, or_masks

__all__ = [
    "AuxOutput",
    "AuxRequest",
    "BlockMask",
    "and_masks",
    "create_block_mask",
    "create_mask",
    "flex_attention",
    "masks",
    "mods",
    "noop_mask",
    "or_masks",
    "reference",
]
__version__ = "0.1.0"
