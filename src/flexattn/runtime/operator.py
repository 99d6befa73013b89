"""Attention and block masks as operators of torch.library: what a compiled graph holds of us.

In: query, key and value (or sizes), the text of the mods (trace.written) and what they capture.
Out: out, lse and max_scores (empty unless wanted), differentiable; or a block mask's table of runs.
torch.compile, torch.export, selective checkpointing and fake tensors see these operators; eager
calls bypass them. Backward of backward is refused by torch, since the backward operator has none.

CUDA graphs: what is derived of a block mask's table depends on its values, which a graph would
replay. Calls with a table are overloads of their own, `attention.masked`, that say so: compilers
launch them between graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flexattn.analysis.block_sparsity import grid_of, mask_runs
from flexattn.analysis.runs import RunTable, all_partial, broadcast_rows
from flexattn.analysis.undecided import Grid
from flexattn.block_mask import BlockMask, UndividedMask
from flexattn.block_mask.bounded import bounded_runs
from flexattn.runtime.autograd import kernels
from flexattn.runtime.call import Call, Result, like_query
from flexattn.trace.written import Replayed, bind, count_whole, needs_gradient, reads

_MODS = "str score, str mask, Tensor[] score_captures, Tensor[] mask_captures, SymInt[] whole"
_INPUTS = ("Tensor query, Tensor key, Tensor value, Tensor[] runs, SymInt[] sizes, float scale, "
           f"bool want_max_scores, {_MODS}")
_library = torch.library.Library("flexattn", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_BETWEEN_GRAPHS = (*_TAGS, torch.Tag.cudagraph_unsafe)
for _overload, _tags in (("", _TAGS), (".masked", _BETWEEN_GRAPHS)):
    _library.define(f"attention{_overload}({_INPUTS}) -> (Tensor, Tensor, Tensor)", tags=_tags)
    _library.define(f"attention_backward{_overload}(Tensor d_out, Tensor? d_lse, Tensor out, "
                    f"Tensor lse, {_INPUTS}) -> Tensor[]", tags=_tags)
_library.define("block_runs(SymInt batch, SymInt heads, SymInt q_len, SymInt kv_len, "
                "SymInt q_block, SymInt kv_block, bool separate_full_blocks, int max_runs, "
                f"Device device, {_MODS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
                tags=_BETWEEN_GRAPHS)
DIVIDED, UNDIVIDED, LISTS = range(3)  # what `runs` are: the last of `sizes`


# Attention


def _call(query: Tensor, key: Tensor, value: Tensor, runs: Sequence[Tensor], sizes: Sequence[int],
          scale: float, want_max_scores: bool, score: str, mask: str,
          score_captures: Sequence[Tensor], mask_captures: Sequence[Tensor], whole: Sequence[int]
          ) -> Call:
    """The arguments of the operator as a call."""
    split = count_whole(score)
    of_mask = (mask, mask_captures, whole[split:])
    block_mask, elements = None, bind(*of_mask)
    if runs and sizes[-1] == LISTS:
        block_mask = _of_lists(runs, sizes, of_mask)
        elements = block_mask.traced(query.device)
    elif runs:
        block_mask = _block_mask(runs, sizes, of_mask)
    return Call(query, key, value, scale, bind(score, score_captures, whole[:split]), elements,
                block_mask, True, want_max_scores)


def _block_mask(runs: Sequence[Tensor], sizes: Sequence[int], of_mask: Any) -> BlockMask:
    """The block mask of a table; kept with the table, so that what is derived from it is, too.
    Undivided masks share tables, and derive nothing of what their mask_mod says."""
    batch, heads, row_block, col_block, mask_batch, mask_heads, q_len, kv_len, form = sizes
    offsets, start, end, full, *count = runs
    undivided = form == UNDIVIDED
    found = None if undivided else getattr(offsets, "_flexattn_block_mask", None)
    if found is None:
        rows = RunTable(offsets, start, end, full, batch, heads, -(-q_len // row_block),
                        row_block, col_block, count[0] if count else None)
        kind = UndividedMask if undivided else BlockMask
        found = kind(rows, (q_len, kv_len), (mask_batch, mask_heads), Replayed(*of_mask),
                     proved=True)
        if not undivided:
            offsets._flexattn_block_mask = found  # type: ignore[attr-defined]
    return found


def _of_lists(lists: Sequence[Tensor], sizes: Sequence[int], of_mask: Any) -> BlockMask:
    """The block mask of torch's lists, checked against its mask_mod as in eager mode; kept with the
    lists for as long as the mask_mod captures the same."""
    text, captures, whole = of_mask
    same = (text, tuple(whole), tuple(map(id, captures)))
    known = getattr(lists[1], "_flexattn_block_mask", None)
    if known is None or known[0] != same:
        counts, indices = lists[2:] or (None, None)
        mask = BlockMask.from_kv_blocks(
            lists[0], lists[1], counts, indices, (sizes[2], sizes[3]),
            Replayed(*of_mask) if text else None, (sizes[6], sizes[7]))
        known = (same, mask, captures)  # captures: their ids stay theirs
        lists[1]._flexattn_block_mask = known  # type: ignore[attr-defined]
    return known[1]


def _forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    call = _call(query, key, value, *rest)
    result = kernels(query.device.type)[0](call)
    assert result.lse is not None
    nothing = result.lse.new_empty(0)
    return result.out, result.lse, nothing if result.max_scores is None else result.max_scores


def _forward_fake(query: Tensor, key: Tensor, value: Tensor, runs: Any, sizes: Any, scale: float,
                  want_max_scores: bool, *rest: Any) -> tuple[Tensor, ...]:
    statistics = torch.float64 if query.dtype is torch.float64 else torch.float32
    lse = query.new_empty(query.shape[:3], dtype=statistics)
    return (like_query(query, value.shape[-1]), lse,
            torch.empty_like(lse) if want_max_scores else lse.new_empty(0))


def _backward(d_out: Tensor, d_lse: Tensor | None, out: Tensor, lse: Tensor,
              *inputs: Any) -> list[Tensor]:
    call = _call(*inputs)
    grads = kernels(out.device.type)[1](call, Result(out, lse), d_out, d_lse)
    found = [grads.query, grads.key, grads.value]
    for capture, grad, needed in zip(call.score.captures if call.score else (), grads.captures,
                                     needs_gradient(inputs[7]), strict=True):
        if needed:
            found.append(torch.zeros_like(capture) if grad is None else grad)
    return [t.contiguous() for t in found]


def _backward_fake(d_out: Tensor, d_lse: Tensor | None, out: Tensor, lse: Tensor,
                   *inputs: Any) -> list[Tensor]:
    needed = [c for c, needs in zip(inputs[9], needs_gradient(inputs[7]), strict=True) if needs]
    return [t.new_empty(t.shape) for t in (*inputs[:3], *needed)]


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    tensors = (*inputs[:3], *inputs[3], *inputs[9], *inputs[10])
    ctx.lengths = [len(inputs[i]) for i in (3, 9, 10)]
    ctx.plain = (inputs[4:9], inputs[11])
    ctx.save_for_backward(output[0], output[1], *tensors)


def _autograd(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None, _: Any) -> tuple:
    out, lse, query, key, value, *rest = ctx.saved_tensors
    runs, score_captures, mask_captures = _split(rest, ctx.lengths)
    head, whole = ctx.plain
    d_out = torch.zeros_like(out) if d_out is None else d_out
    of_backward = torch.ops.flexattn.attention_backward
    d_query, d_key, d_value, *found = (of_backward.masked if runs else of_backward.default)(
        d_out, d_lse, out, lse, query, key, value, runs, *head, score_captures, mask_captures,
        whole)
    given = iter(found)
    captures = [next(given) if needed else None for needed in needs_gradient(head[3])]
    sizes = head[0]
    return (d_query, d_key, d_value, [None] * len(runs), None if sizes else [], None, None, None,
            None, captures, [None] * len(mask_captures),
            None if whole else [])  # torch takes an empty list for one of tensors


def _split(tensors: Sequence[Tensor], lengths: Sequence[int]) -> list[list[Tensor]]:
    given = iter(tensors)
    return [[next(given) for _ in range(n)] for n in lengths]


# Block masks


def _block_runs(batch: int, heads: int, q_len: int, kv_len: int, q_block: int, kv_block: int,
                separate_full_blocks: bool, max_runs: int, device: torch.device, score: str,
                mask: str, score_captures: Sequence[Tensor], mask_captures: Sequence[Tensor],
                whole: Sequence[int]) -> tuple[Tensor, ...]:
    mod = bind(mask, mask_captures, whole)
    assert mod is not None
    images = _images(mask, batch, heads)
    if max_runs >= 0:
        grid = Grid(*images, q_len, kv_len, q_block, kv_block)
        table = bounded_runs(mod, grid, device, max_runs, separate_full_blocks)
    else:
        grid = grid_of(mod, batch, heads, q_len, kv_len, q_block, kv_block)
        table = mask_runs(mod, grid, device)
        if not separate_full_blocks:
            table = all_partial(table, grid.columns)
        table = broadcast_rows(table, *images)
    found = table.offsets.new_empty(0) if table.runs is None else table.runs.clone()
    return (table.offsets, table.start, table.end, table.full,
            torch.zeros(images, dtype=torch.int8, device=device), found)  # a shape is what counts


def _images(mask: str, batch: int, heads: int) -> tuple[int, int]:
    """Batch entries and heads that the table has rows for."""
    return batch if reads(mask, "b") else 1, heads if reads(mask, "h") else 1


def _block_runs_fake(batch: int, heads: int, q_len: int, kv_len: int, q_block: int, kv_block: int,
                     separate_full_blocks: bool, max_runs: int, device: torch.device, score: str,
                     mask: str, *rest: Any) -> tuple[Tensor, ...]:
    images = _images(mask, batch, heads)
    rows = images[0] * images[1] * (-(-q_len // q_block))
    runs = torch.library.get_ctx().new_dynamic_size() if max_runs < 0 else max_runs
    offsets, start, end, found = (torch.empty(n, dtype=torch.int32, device=device)
                                  for n in (rows + 1, runs, runs, int(max_runs >= 0)))
    return (offsets, start, end, torch.empty(runs, dtype=torch.bool, device=device),
            torch.empty(images, dtype=torch.int8, device=device), found)


for _name, _kernel, _fake in (("attention", _forward, _forward_fake),
                              ("attention.masked", _forward, _forward_fake),
                              ("attention_backward", _backward, _backward_fake),
                              ("attention_backward.masked", _backward, _backward_fake),
                              ("block_runs", _block_runs, _block_runs_fake)):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flexattn::{_name}", _fake, lib=_library)
for _name in ("attention", "attention.masked"):
    torch.library.register_autograd(f"flexattn::{_name}", _autograd,
                                    setup_context=_setup_context, lib=_library)
