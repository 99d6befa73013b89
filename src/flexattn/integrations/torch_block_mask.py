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
    if isinstance(mask, _torch_class()):
        return mask
    ours: Any = type(mask)
    made = object.__new__(_class(ours))
    made.__dict__.update(mask.__dict__)
    return made


@cache
def _torch_class() -> Any:
    from torch.nn.attention import flex_attention

    return flex_attention.BlockMask


@cache
def _class(ours: Any) -> type[BlockMask]:
    class TorchCompatibleBlockMask(ours, _torch_class()):  # type: ignore[misc]
        """A flexattn.BlockMask that is also torch's."""

    register(TorchCompatibleBlockMask)
    return TorchCompatibleBlockMask
