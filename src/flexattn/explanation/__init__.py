"""explain: what flexattn makes of a call, as text: graphs, gradient, generated code, kernel, tile.

In: the arguments of flex_attention. Out: an `Explanation`, which prints well and gives a dict.
One file per target (`cpu`, `gpu`) says what only it knows; `report` holds what they say.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flexattn.analysis.gradient import gradient
from flexattn.block_mask import BlockMask
from flexattn.explanation import cpu, gpu
from flexattn.explanation.report import Explanation, Kernel, MaskPicture, ModText
from flexattn.ir.mod import Mod
from flexattn.ir.ops import dtype_name
from flexattn.pictures import block_cells
from flexattn.pictures import text as text_picture
from flexattn.runtime.call import Call
from flexattn.trace import definition, specialize, trace_score_mod

__all__ = ["Explanation", "Kernel", "MaskPicture", "ModText", "explain"]

_PICTURE = 24  # most rows and columns of a mask's picture
_TARGETS: dict[str, Any] = {"cpu": cpu, "gpu": gpu}


def explain(query: Tensor, key: Tensor, value: Tensor, score_mod: Callable | None = None,
            block_mask: BlockMask | None = None, scale: float | None = None,
            enable_gqa: bool = False, *, target: str | None = None) -> Explanation:
    """What `flex_attention` with these arguments runs; nothing is computed.

    Args:
        query, key, value, score_mod, block_mask, scale, enable_gqa: as for flex_attention.
        target: "cpu" or "gpu": whose code to show; default that of query's device. The code for
            a GPU is shown on machines without one, too.

    Returns: an Explanation; `print` shows all of it, `to_dict()` is for programs.

    Errors: those of tracing the mods.

    Examples:
        >>> q = torch.randn(1, 2, 128, 64)
        >>> text = str(explain(q, q, q, lambda score, b, h, q_idx, kv_idx: score * 2))
        >>> "return score" in text
        True
    """
    target = target or ("cpu" if query.device.type == "cpu" else "gpu")
    made = _TARGETS[target]
    dtype = torch.float64 if query.dtype is torch.float64 else torch.float32
    score = None if score_mod is None else specialize(
        trace_score_mod(score_mod, dtype, query.device))
    mask = None if block_mask is None else block_mask.traced(query.device)
    call = Call(query, key, value, scale or 1 / math.sqrt(query.shape[-1]), score, mask, block_mask)
    code = made.code(call)
    return Explanation(
        inputs=_inputs(call), target=target, language=made.LANGUAGE,
        score=_mod_text(score_mod, score, code.get("score_mod", ""), differentiable=True),
        mask=_mod_text(getattr(block_mask, "mask_mod", None), mask, code.get("mask_mod", "")),
        picture=None if block_mask is None else _picture(block_mask),
        kernels=made.kernels(call))


def _inputs(call: Call) -> dict[str, str]:
    tensors = {"query": call.query, "key": call.key, "value": call.value}
    return {name: f"{dtype_name(t.dtype)} {list(t.shape)} on {t.device}"
            for name, t in tensors.items()} | {"scale": f"{call.scale:.6g}"}


def _mod_text(function: Callable | None, mod: Mod | None, code: str,
              differentiable: bool = False) -> ModText | None:
    if function is None or mod is None:
        return None
    where = definition(function)
    captures = tuple(f"{dtype_name(t.dtype)} {list(t.shape)}"
                     + ", gets a gradient" * t.requires_grad for t in mod.captures)
    return ModText(name=getattr(function, "__name__", type(function).__name__),
                   where=str(where) if where else "", graph=str(mod.graph),
                   gradient=str(gradient(mod.graph).graph) if differentiable else "",
                   captures=captures, numbers=tuple(map(repr, mod.numbers)), code=code)


def _picture(mask: BlockMask) -> MaskPicture:
    cells = block_cells(mask.rows(), *mask.seq_lengths, limit=(_PICTURE, _PICTURE))
    rows = mask.rows()
    blocks = (rows.end - rows.start).long()
    broadcast = mask.shape[0] * mask.shape[1] // (rows.batch * rows.heads)
    total = mask.shape[0] * mask.shape[1] * rows.num_rows * -(-mask.shape[3] // rows.col_block)
    full, visited = (broadcast * int(n.sum()) for n in (blocks[rows.full], blocks))
    return MaskPicture(shape=mask.shape, block_size=mask.BLOCK_SIZE, full=full,
                       partial=visited - full, empty=total - visited, runs=len(rows.start),
                       sparsity=round(mask.sparsity(), 2), picture=text_picture(cells))
