"""Different masks for different heads."""

from __future__ import annotations

from torch import Tensor

from flexattn.errors import ArgumentError, message
from flexattn.masks.arguments import Index, MaskMod, index_tensor


def per_head(choice: Tensor, *masks: MaskMod) -> MaskMod:
    """Query head h uses `masks[choice[h]]`; a choice that names no mask attends nothing.

    choice: integer tensor of shape [H], on the device of the query. Changing its values needs a new
    block mask, but no new code.

    Errors: ArgumentError without a mask.
    Example: `per_head(kinds, spatial_head(1350, 2), temporal_head(1350, 13, 2))`.
    """
    table = index_tensor("choice", choice, "[H]")
    if not masks:
        raise ArgumentError(message("per_head has no mask to choose", expected="at least one"))

    def mask(b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Tensor:
        chosen = table[h]
        attended = (chosen == 0) & masks[0](b, h, q_idx, kv_idx)
        for number, other in enumerate(masks[1:], start=1):
            attended = attended | ((chosen == number) & other(b, h, q_idx, kv_idx))
        return attended

    return mask
