"""flex_attention: validate -> trace -> launch.

In: query, key, value, a score mod and a block mask, as torch.nn.attention.flex_attention takes
them. Out: attention, and on request its log-sum-exp and largest scores. Rejects arguments that do
not fit together, saying what was expected, what came and the remedy.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexattn.block_mask import BlockMask, UndividedMask
from flexattn.dynamo import with_mods
from flexattn.errors import ArgumentError, DeviceError, DtypeError, ShapeError, message
from flexattn.runtime import operator
from flexattn.runtime.autograd import attend
from flexattn.runtime.call import Call, Result
from flexattn.trace import Mod, memo

_NAMES = ("query", "key", "value")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


FlexKernelOptions = dict[str, Any]  # torch's name for what kernel_options takes


@dataclass(frozen=True)
class AuxRequest:
    """Which auxiliary outputs to return."""

    lse: bool = False
    max_scores: bool = False


@dataclass(frozen=True)
class AuxOutput:
    """lse: natural logarithm of the sum of exp(score), [B, Hq, Q]; max_scores [B, Hq, Q]. Both
    float32 (float64 for float64 inputs), None where not requested."""

    lse: Tensor | None = None
    max_scores: Tensor | None = None


_NOTHING_ELSE, _ONLY_LSE = AuxRequest(), AuxRequest(lse=True)


def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable | None = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: Mapping[str, Any] | None = None,
    *,
    return_aux: AuxRequest | None = None,
) -> Any:
    """softmax(score_mod(scale * query key^T)) value over the positions of `block_mask`.

    Args:
        query: [B, Hq, Q, D], float32, bfloat16, float16 or float64; any strides.
        key, value: [B or 1, Hkv, KV, D] and [B or 1, Hkv, KV, Dv], of query's dtype and device.
        score_mod: `(score, b, h, q_idx, kv_idx) -> score` on scalars; may capture tensors (which
            get gradients) and numbers. h is the query head.
        block_mask: from `create_block_mask` (or torch's).
        scale: default 1 / sqrt(D).
        enable_gqa: allow Hq to be a multiple of Hkv.
        return_lse: deprecated; also return lse. Use return_aux.
        kernel_options: any keys; torch's hints for its own kernels are accepted and change
            nothing. Ours, in eager calls: "deterministic" (bool) asks for the same bits in every
            run, as torch.use_deterministic_algorithms does; "autotune" (bool) times all kernels
            and tiles that serve the call on this GPU once, and keeps the fastest on disk (not where
            the call is to be deterministic).
        return_aux: AuxRequest(lse, max_scores); the result is then (out, AuxOutput).

    Under autocast, query, key and value are cast as scaled_dot_product_attention's. In eager mode a
    mod is traced again when anything it reads has changed, or when that cannot be told; under
    torch.compile once for what Dynamo guards on.

    Returns: out [B, Hq, Q, Dv] in query's dtype; (out, lse) or (out, AuxOutput) on request. A
        fully masked row has out 0 and lse -inf.

    Raises: ShapeError, DtypeError, DeviceError, ArgumentError; TraceError for a mod that cannot be
        traced; IndexOutOfRangeError for a captured tensor read out of range where attended.

    Source: https://pytorch.org/blog/flexattention/

    Examples:
        >>> q, k, v = torch.randn(3, 1, 4, 128, 64)
        >>> def softcap(score, b, h, q_idx, kv_idx):
        ...     return 20 * torch.tanh(score / 20)
        >>> flex_attention(q, k, v, score_mod=softcap).shape
        torch.Size([1, 4, 128, 64])
    """
    if return_lse and return_aux is not None:
        raise ArgumentError(message("return_lse and return_aux are both given.",
                                    remedy="use return_aux=AuxRequest(lse=True) alone"))
    if return_lse:
        warnings.warn("return_lse is deprecated: use return_aux=AuxRequest(lse=True)",
                      FutureWarning, stacklevel=2)
    query, key, value = _autocast(query, key, value)
    _check_tensors(query, key, value, enable_gqa)
    if block_mask is not None:
        block_mask = _our_mask(block_mask)
        _check_mask(block_mask, query, key)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    aux = return_aux or (_ONLY_LSE if return_lse else _NOTHING_ELSE)
    if by_operator():
        result = _by_operator(query, key, value, score_mod, block_mask, scale, aux)
    else:
        result = attend(_call(query, key, value, score_mod, block_mask, scale, aux,
                              kernel_options or {}))
    return _returned(result, return_lse, return_aux)


def _autocast(*tensors: Tensor) -> Any:
    """As scaled_dot_product_attention: under autocast, its dtype for all floats but float64."""
    device = tensors[0].device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return [t.to(dtype) if t.dtype in _DTYPES[:3] else t for t in tensors]


def by_operator() -> bool:
    """Whether a compiler or a dispatch mode watches: it has to see an operator."""
    return torch.compiler.is_dynamo_compiling() or torch._C._len_torch_dispatch_stack() > 0


def _by_operator(query: Tensor, key: Tensor, value: Tensor, score_mod: Callable | None,
                 block_mask: Any, scale: float, aux: AuxRequest) -> Result:
    """The call as an operator that compilers and dispatch modes see (runtime.operator)."""
    runs: list[Tensor] = []
    sizes: list[int] = []
    mask_mod = None
    if block_mask is not None and not isinstance(block_mask, BlockMask):  # torch's
        mask_mod, runs = block_mask.mask_mod, [block_mask.kv_num_blocks, block_mask.kv_indices]
        if block_mask.full_kv_indices is not None:
            runs += [block_mask.full_kv_num_blocks, block_mask.full_kv_indices]
        batch, heads, q_len, kv_len = block_mask.shape
        sizes = [batch, heads, *block_mask.BLOCK_SIZE, batch, heads, q_len, kv_len, operator.LISTS]
    elif block_mask is not None:
        table, mask_mod = block_mask.table, block_mask.element_mod()
        runs = [table.offsets, table.start, table.end, table.full]
        runs += [] if table.runs is None else [table.runs]
        sizes = [table.batch, table.heads, table.row_block, table.col_block, *block_mask.shape,
                 operator.UNDIVIDED if isinstance(block_mask, UndividedMask) else operator.DIVIDED]
    name = "attention.masked" if runs else "attention"
    out, lse, top = with_mods(name, query, score_dtype(query), score_mod, mask_mod, query,
                              key, value, runs, sizes, scale, aux.max_scores)
    return Result(out, lse if aux.lse else None, top if aux.max_scores else None)


def score_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype is torch.float64 else torch.float32


def _returned(result: Result, return_lse: bool, return_aux: AuxRequest | None) -> Any:
    if return_aux is not None:
        return result.out, AuxOutput(result.lse, result.max_scores)
    return (result.out, result.lse) if return_lse else result.out


def _call(query: Tensor, key: Tensor, value: Tensor, score_mod: Callable | Mod | None,
          block_mask: BlockMask | None, scale: float, aux: AuxRequest,
          options: Mapping[str, Any]) -> Call:
    """Integrations that know what their mods capture give a Mod, traced once."""
    if query.is_neg() or key.is_neg() or value.is_neg():  # views that negate when they are read
        query, key, value = (t.resolve_neg() for t in (query, key, value))
    mask = None if block_mask is None else block_mask.traced(query.device)
    score = score_mod if score_mod is None or isinstance(score_mod, Mod) else memo.score_mod(
        score_mod, score_dtype(query), query.device)
    return Call(query, key, value, scale, score, mask, block_mask, aux.lse, aux.max_scores,
                options)


def _our_mask(block_mask: Any) -> Any:
    """A BlockMask; operators take torch's as it is, since a compiler cannot look at its values."""
    if isinstance(block_mask, BlockMask):
        return block_mask
    if type(block_mask).__name__ == "BlockMask" and hasattr(block_mask, "kv_indices"):
        return block_mask if by_operator() else BlockMask.from_torch(block_mask)
    raise ArgumentError(message("block_mask is not a BlockMask.", expected="a BlockMask or None",
                                got=type(block_mask).__name__,
                                remedy="create_block_mask(mask_mod, B, H, Q_LEN, KV_LEN)"))


def _check_tensors(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    for name, t in zip(_NAMES, (query, key, value), strict=True):
        if not isinstance(t, Tensor) or t.dim() != 4:
            raise ShapeError(message(f"{name} must be a 4-D tensor.",
                                     expected="[batch, heads, length, head_dim]",
                                     got=str(tuple(getattr(t, "shape", ())) or type(t).__name__),
                                     remedy="add a batch dimension with tensor[None]"))
    dtype, device = query.dtype, query.device
    if dtype not in _DTYPES or key.dtype is not dtype or value.dtype is not dtype:
        raise DtypeError(message("query, key and value must have one floating-point dtype.",
                                 expected="float32, bfloat16, float16 or float64",
                                 got=f"{dtype}, {key.dtype}, {value.dtype}",
                                 remedy="convert them with .to(dtype)"))
    if key.device != device or value.device != device:
        raise DeviceError(message("query, key and value must be on one device.",
                                  expected=str(device), got=f"{key.device}, {value.device}",
                                  remedy=f".to('{device}')"))
    _check_shapes(query, key, value, enable_gqa)


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    q, k, v = query.shape, key.shape, value.shape
    q_heads, kv_heads = q[1], k[1]
    remedy = ""
    if k[:3] != v[:3]:
        what = "key and value do not fit together."
        expected = "the same batch, heads and length"
    elif q[3] != k[3] or q[3] == 0:
        what = "query and key have different head dimensions."
        expected = f"key [..., {q[3]}]"
    elif k[0] not in (1, q[0]):
        what = "key and value have another batch size than query."
        expected = f"{q[0]} or 1"
    elif q_heads == kv_heads:
        return
    elif not enable_gqa:
        what = "query and key have different numbers of heads."
        expected = f"{q_heads} key heads"
        remedy = "pass enable_gqa=True for grouped-query attention"
    elif kv_heads == 0 or q_heads % kv_heads:
        what = "The number of query heads must be a multiple of that of key heads."
        expected = f"a multiple of {kv_heads}"
    else:
        return
    raise ShapeError(message(what, expected=expected, remedy=remedy,
                             got=f"query {tuple(q)}, key {tuple(k)}, value {tuple(v)}"))


def _check_mask(mask: Any, query: Tensor, key: Tensor) -> None:
    batch, heads, q_len, _ = query.shape
    given, lengths = mask.shape, (q_len, key.shape[2])
    if given[2:] != lengths:
        raise ShapeError(message("block_mask was made for other lengths.",
                                 expected=f"q_len, kv_len = {lengths}", got=str(given[2:]),
                                 remedy="create_block_mask with these lengths"))
    if isinstance(mask, BlockMask) and not torch.compiler.is_compiling():  # no guards for it
        covered = mask.table.num_rows * mask.table.row_block
        if covered < q_len:
            raise ShapeError(message(
                "block_mask has too few rows of blocks for its seq_lengths.", got=str(q_len),
                expected=f"at most {covered} queries",
                remedy="block_mask.adjust(q_len, kv_len) instead of assigning"))
    for size, n, name in ((given[0], batch, "batch"), (given[1], heads, "heads")):
        if size not in (1, n):
            raise ShapeError(message(f"block_mask was made for another {name} size.",
                                     expected=f"{n} or 1", got=str(size),
                                     remedy=f"create_block_mask with {name} {n} or None"))
    device = mask.device if isinstance(mask, BlockMask) else mask.kv_indices.device
    if device != query.device:
        raise DeviceError(message("block_mask is on another device.", expected=str(query.device),
                                  got=str(device), remedy=f".to('{query.device}')"))
