"""BlockMask as a pytree: its leaves are the four tensors of its rows of runs, no view is computed.

What mask_mod captured is no leaf, as `BlockMask.to` does not move it either.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch.utils._pytree import GetAttrKey, register_pytree_node

if TYPE_CHECKING:
    from flexattn.block_mask.mask import BlockMask

_LEAVES = ("offsets", "start", "end", "full")


def register(mask_type: type[BlockMask]) -> None:
    """Tells torch's pytrees about the type; its leaves may be replaced by anything."""
    def flatten(mask: BlockMask) -> tuple[list[Any], Any]:
        rows = mask.rows()
        none = replace(rows, **dict.fromkeys(_LEAVES))  # type: ignore[arg-type]
        return [getattr(rows, name) for name in _LEAVES], (none, *mask.settings())

    def flatten_with_keys(mask: BlockMask) -> tuple[list[Any], Any]:
        leaves, context = flatten(mask)
        return [(GetAttrKey(name), x) for name, x in zip(_LEAVES, leaves, strict=True)], context

    def unflatten(leaves: Iterable[Any], context: Any) -> BlockMask:
        none, *settings = context
        rows = replace(none, **dict(zip(_LEAVES, leaves, strict=True)))
        return mask_type.of_settings(rows, *settings)

    register_pytree_node(mask_type, flatten, unflatten, flatten_with_keys_fn=flatten_with_keys,
                         serialized_type_name="flexattn.BlockMask")
