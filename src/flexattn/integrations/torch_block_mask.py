"""Block masks that code written for torch's flex_attention recognises.

In: our BlockMask. Out: the same mask as an instance of both classes, so that
`isinstance(mask, torch.nn.attention.flex_attention.BlockMask)` holds. Imports torch's module when
first asked for.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from flexattn.block_mask import BlockMask, register


def as_torch(mask: BlockMask) -> BlockMask:
    """`mask`, also an instance of torch's class; its slices and copies are, too. Under
    torch.compile, which follows no such class, it stays ours."""
    if torch.compiler.is_compiling():
        return mask
    cls = _class()
    if isinstance(mask, cls):
        return mask
    made = object.__new__(cls)
    made.__dict__.update(mask.__dict__)
    return made


@cache
def _class() -> type[BlockMask]:
    from torch.nn.attention import flex_attention

    torch_class: Any = flex_attention.BlockMask

    class TorchCompatibleBlockMask(BlockMask, torch_class):
        """A flexattn.BlockMask that is also torch's."""

    register(TorchCompatibleBlockMask)
    return TorchCompatibleBlockMask
