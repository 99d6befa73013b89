"""flexattn: any attention variant in a few lines of Python, at the speed of a fused kernel."""

from typing import TYPE_CHECKING, Any

from flexattn import masks, mods, reference
from flexattn.attention import AuxOutput, AuxRequest, FlexKernelOptions, flex_attention
from flexattn.block_mask import BlockMask, create_block_mask, create_mask
from flexattn.masks.compose import and_masks, noop_mask, or_masks

if TYPE_CHECKING:
    from flexattn.explanation import explain
    from flexattn.integrations.replace_torch import replace_torch

__all__ = [
    "AuxOutput",
    "AuxRequest",
    "BlockMask",
    "FlexKernelOptions",
    "and_masks",
    "create_block_mask",
    "create_mask",
    "explain",
    "flex_attention",
    "masks",
    "mods",
    "noop_mask",
    "or_masks",
    "reference",
    "replace_torch",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """What most programs do without, imported when first used."""
    if name == "replace_torch":
        from flexattn.integrations.replace_torch import replace_torch

        return replace_torch
    if name == "explain":
        from flexattn.explanation import explain

        return explain
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
