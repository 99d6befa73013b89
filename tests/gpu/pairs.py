"""Cases for the GPU: every pair of values of the axes below occurs in one of them.

A case makes its tensors afresh, runs ours, and says how far a result is from float64 in units of
what eager attention in the same dtype is off.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flexattn import create_block_mask, flex_attention
from flexattn.attention import AuxRequest
from flexattn.reference import attention

DEVICE = "cuda"
BATCH = 2
ROUNDING = 1e-6  # relative error that float32 results may have whatever eager's is
# What rounding a number changes at most (in float32: how far a GPU's exp2 is off), and the standard
# deviation of it as a share of that.
UNIT = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "tf32": 2.0**-11, "float32": 2.0**-22}
DEVIATION = 0.4
HALF_UNIT = 2.0**-24  # of a float32: so much of itself lse is off, and probabilities made from it
AXES: dict[str, Sequence[Any]] = {
    "dims": ((64, 64), (128, 128), (16, 16), (96, 96), (80, 80), (256, 256), (192, 128),
             (16, 40), (576, 512), (512, 512)),
    "lengths": ((333, 333), (1, 1500), (1000, 1000), (5, 700), (257, 130), (64, 1024), (128, 128)),
    "score": ("none", "softcap", "alibi", "bias", "two_reads", "ten_ops", "pair_bias", "buckets"),
    "mask": ("none", "causal", "sliding", "documents", "heads", "holes", "scattered"),
    "dtype": ("bfloat16", "float16", "tf32", "float32"),
    "heads": ((2, 1), (2, 4), (1, 3), (1, 7)),  # kv_heads, group
    "layout": ("plain", "rows_of_heads", "one_batch", "columns", "offset"),
}
# Not together in a case: their backward takes a minute to compile. The forward has its own test.
APART = frozenset({((576, 512), "float32"), ((512, 512), "float32")})


@dataclass(frozen=True)
class Case:
    """One value of each axis."""

    dims: tuple[int, int]
    lengths: tuple[int, int]
    score: str
    mask: str
    dtype: str
    heads: tuple[int, int]
    layout: str

    def __str__(self) -> str:
        return "-".join("/".join(map(str, v)) if isinstance(v := getattr(self, f.name), tuple)
                        else v for f in fields(self))

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype == "tf32" else getattr(torch, self.dtype)

    @property
    def precision(self) -> str:
        return "high" if self.dtype == "tf32" else "highest"

    @property
    def num_heads(self) -> int:
        return self.heads[0] * self.heads[1]

    def inputs(self) -> list[Tensor]:
        """query, key, value in the case's layout, requiring gradients."""
        batch = 1 if self.layout == "one_batch" else BATCH
        shapes = ((BATCH, self.num_heads, self.lengths[0], self.dims[0]),
                  (batch, self.heads[0], self.lengths[1], self.dims[0]),
                  (batch, self.heads[0], self.lengths[1], self.dims[1]))
        return [self._laid_out(shape).requires_grad_() for shape in shapes]

    def _laid_out(self, shape: tuple[int, int, int, int]) -> Tensor:
        made = torch.randn(shape, device=DEVICE, dtype=self.torch_dtype)
        if self.layout == "rows_of_heads":
            return made.transpose(1, 2).contiguous().transpose(1, 2)
        if self.layout == "columns":
            return made.mT.contiguous().mT
        if self.layout == "offset":  # no row begins at a multiple of 16 bytes
            wide = torch.full((*shape[:3], shape[3] + 3), float("nan"), device=DEVICE,
                              dtype=self.torch_dtype)
            wide[..., 1:-2] = made
            return wide[..., 1:-2]
        return made

    def mods(self) -> tuple[Callable | None, Callable | None, list[Tensor]]:
        """score_mod, mask_mod and the captured tensors that want gradients."""
        score_mod, trained = SCORES[self.score](self)
        return score_mod, MASKS[self.mask](self), trained


# Score mods

def _none(case: Case) -> tuple[None, list[Tensor]]:
    return None, []


def _softcap(case: Case) -> tuple[Callable, list[Tensor]]:
    return lambda score, b, h, q_idx, kv_idx: 2.0 * torch.tanh(score / 2.0), []


def _alibi(case: Case) -> tuple[Callable, list[Tensor]]:
    slopes = (torch.rand(case.num_heads, device=DEVICE) * 0.1).requires_grad_()
    return lambda score, b, h, q_idx, kv_idx: score + slopes[h] * (kv_idx - q_idx), [slopes]


def _bias(case: Case) -> tuple[Callable, list[Tensor]]:
    q_len, kv_len = case.lengths
    bias = torch.randn(case.num_heads, q_len + kv_len, device=DEVICE, requires_grad=True)
    return lambda score, b, h, q_idx, kv_idx: score + bias[h, q_idx - kv_idx + kv_len], [bias]


def _two_reads(case: Case) -> tuple[Callable, list[Tensor]]:
    column = torch.randn(BATCH, case.lengths[1], device=DEVICE, requires_grad=True)
    gain = torch.randn(case.num_heads, device=DEVICE, requires_grad=True)
    group = torch.arange(case.lengths[1], device=DEVICE) // 3
    return (lambda score, b, h, q_idx, kv_idx:
            score * gain[h] + column[b, kv_idx] * column[0, group[kv_idx]]), [column, gain]


def _ten_ops(case: Case) -> tuple[Callable, list[Tensor]]:
    slopes = torch.rand(case.num_heads, device=DEVICE)

    def mod(score, b, h, q_idx, kv_idx):
        distance = (q_idx - kv_idx).abs()
        capped = 3.0 * torch.tanh(score / 3.0)
        near = torch.where(distance < 12, capped - slopes[h] * 0.1 * distance, capped * 0.5)
        return near + torch.cos(distance * 0.1)
    return mod, []


def _pair_bias(case: Case) -> tuple[Callable, list[Tensor]]:
    pair = torch.randn(case.lengths, device=DEVICE, requires_grad=True)
    return lambda score, b, h, q_idx, kv_idx: score + pair[q_idx, kv_idx], [pair]


def _buckets(case: Case) -> tuple[Callable, list[Tensor]]:
    table = torch.randn(40, case.num_heads, device=DEVICE, requires_grad=True)
    return (lambda score, b, h, q_idx, kv_idx: score + table[torch.log2(
        (q_idx - kv_idx).abs().float() + 1).mul(3).to(torch.int64).clamp(max=39), h]), [table]


def _frozen(make: Callable[[Case], tuple[Callable, list[Tensor]]]) -> Callable:
    """The same score mod with captured tensors that want no gradients."""
    def frozen(case: Case) -> tuple[Callable, list[Tensor]]:
        mod, trained = make(case)
        for tensor in trained:
            tensor.requires_grad_(False)
        return mod, []
    return frozen


SCORES = {"none": _none, "softcap": _softcap, "alibi": _alibi, "bias": _bias,
          "two_reads": _two_reads, "ten_ops": _ten_ops, "pair_bias": _pair_bias,
          "buckets": _buckets, "frozen_alibi": _frozen(_alibi), "frozen_bias": _frozen(_bias),
          "frozen_reads": _frozen(_two_reads)}


# Masks

def _documents(case: Case) -> Callable:
    q_doc, kv_doc = (torch.sort(torch.randint(0, 4, (BATCH, n), device=DEVICE)).values
                     for n in case.lengths)
    return lambda b, h, q_idx, kv_idx: q_doc[b, q_idx] == kv_doc[b, kv_idx]


def _holes(case: Case) -> Callable:
    """Some queries attend to nothing, whole blocks of them too."""
    return lambda b, h, q_idx, kv_idx: ((q_idx % 3 > 0) & (q_idx // 128 != 1)
                                        & ((kv_idx + b) % 200 > 20))


MASKS: dict[str, Callable[[Case], Callable | None]] = {
    "none": lambda case: None,
    "causal": lambda case: lambda b, h, q_idx, kv_idx:
        q_idx + (case.lengths[1] - case.lengths[0]) >= kv_idx,
    "sliding": lambda case: lambda b, h, q_idx, kv_idx: (kv_idx - q_idx).abs() < 100,
    "documents": _documents,
    "heads": lambda case: lambda b, h, q_idx, kv_idx: (kv_idx >= 40 * h) | (kv_idx == q_idx),
    "holes": _holes,
    "scattered": lambda case: lambda b, h, q_idx, kv_idx: (q_idx * 7 + kv_idx * 5) % 11 < 4,
}


# Running and comparing

@dataclass(frozen=True)
class Results:
    """out, lse and gradients by name; NaN nowhere."""

    tensors: dict[str, Tensor]


Weights = tuple[Tensor, Tensor | None]  # what out and lse are multiplied with in the loss


def ours(case: Case, inputs: list[Tensor], weights: Weights, mods: Any,
         grads: bool = True, **options: Any) -> Results:
    score_mod, mask_mod, trained = mods
    mask = None if mask_mod is None else create_block_mask(
        mask_mod, BATCH, case.num_heads if case.mask == "heads" else None, *case.lengths,
        device=DEVICE)
    with precision(case):
        out, aux = flex_attention(*inputs, score_mod=score_mod, block_mask=mask, enable_gqa=True,
                                  return_aux=AuxRequest(lse=True), kernel_options=options)
        return _results(out, aux.lse, inputs, trained, weights, grads)


def dense(case: Case, inputs: list[Tensor], weights: Weights, mods: Any,
          dtype: torch.dtype) -> Results:
    """By the formula, in float64 or, as eager code would, in the case's dtype."""
    score_mod, mask_mod, trained = mods
    with tf32_products(case.dtype == "tf32" and dtype is torch.float32):
        out, lse, _ = attention(*inputs, score_mod, mask_mod, None, dtype)
        return _results(out, lse, inputs, trained, weights, True)


def moved_by_delta(case: Case, inputs: list[Tensor], weights: Weights, mods: Any, exact: Results,
                   draws: int = 8) -> dict[str, float]:
    """The standard deviation of gradients, relative to their norms, when the row sums
    delta = sum(d_out * out) are off as in fused kernels (SDPA's and FlashAttention's, too), each
    product in them rounded to the case's dtype. An error of delta_i changes a gradient by that
    times the gradient of lse_i: where a row's terms cancel, by far more than eager attention is
    off."""
    score_mod, mask_mod, trained = mods
    out, lse, _ = attention(*inputs, score_mod, mask_mod, None, torch.float64)
    off = DEVIATION * UNIT[case.dtype] * (out * weights[0]).norm(dim=-1).detach()
    names, tensors = _trained(inputs, trained)
    names.remove("value")
    found = []
    for _ in range(draws):
        moved = torch.where(lse.isinf(), 0.0, lse * off * torch.randn_like(lse)).sum()
        found.append(torch.autograd.grad(moved, [t for t in tensors if t is not inputs[2]],
                                         retain_graph=True))
    return {name: float(torch.stack(grads).double().norm() / draws**0.5
                        / exact.tensors[name].double().norm().clamp(min=1e-30))
            for name, grads in zip(names, zip(*found, strict=True), strict=True)}


def _trained(inputs: list[Tensor], captured: list[Tensor]) -> tuple[list[str], list[Tensor]]:
    """What has gradients, by name."""
    names = ["query", "key", "value", *(f"captured{i}" for i in range(len(captured)))]
    return names, [*inputs, *captured]


def _results(out: Tensor, lse: Tensor, inputs: list[Tensor], trained: list[Tensor],
             weights: Weights, grads: bool) -> Results:
    found = {"out": out.detach(), "lse": lse.detach()}
    if grads:
        loss = (out * weights[0].to(out.dtype)).sum()
        if weights[1] is not None:
            loss = loss + torch.where(lse.isinf(), 0.0, lse * weights[1].to(lse.dtype)).sum()
        names, tensors = _trained(inputs, trained)
        found |= dict(zip(names, torch.autograd.grad(loss, tensors), strict=True))
    return Results(found)


class precision:
    """torch's precision of products of float32, for a case."""

    def __init__(self, case: Case) -> None:
        self.wanted = case.precision

    def __enter__(self) -> None:
        self.before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.wanted)

    def __exit__(self, *_: object) -> None:
        torch.set_float32_matmul_precision(self.before)


def to_tf32(x: Tensor) -> Tensor:
    """float32 rounded to the nearest tf32."""
    return ((x.view(torch.int32) + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)


class _RoundedProducts(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (),
                           kwargs: Any = None) -> Any:
        if function in (torch.ops.aten.bmm.default, torch.ops.aten.mm.default):
            args = [to_tf32(a.contiguous()) for a in args]
        return function(*args, **(kwargs or {}))


def tf32_products(wanted: bool) -> AbstractContextManager:
    """Matrix products of operands rounded to tf32: cuBLAS, asked for it, does so for some only."""
    return _RoundedProducts() if wanted else nullcontext()


def weights_of(case: Case) -> tuple[Tensor, Tensor]:
    rows = (BATCH, case.num_heads, case.lengths[0])
    return (torch.randn(*rows, case.dims[1], device=DEVICE, dtype=case.torch_dtype),
            torch.randn(rows, device=DEVICE))


def error(found: Tensor, exact: Tensor) -> float:
    """Relative, over all elements; infinite elements must agree."""
    finite = exact.isfinite()
    if not torch.equal(found.isfinite(), finite) or not torch.equal(found[~finite].double(),
                                                                    exact[~finite].double()):
        return float("inf")
    difference = (found[finite].double() - exact[finite].double()).norm()
    return float(difference / exact[finite].double().norm().clamp(min=1e-30))


def finite_peak(lse: Tensor) -> float:
    """Its largest magnitude, rows that attend to nothing aside."""
    return float(torch.where(lse.isfinite(), lse, 0.0).abs().max())


def warm(case: Case, environment: dict[str, str]) -> None:
    """Compiles a case's kernels into the cache; errors are left to the test."""
    os.environ.update(environment)
    try:
        ours(case, case.inputs(), weights_of(case), case.mods())
    except Exception as problem:
        print(f"{case}: {problem}")


# Choosing

def pairwise(axes: dict[str, Sequence[Any]] = AXES) -> Iterator[Case]:
    """Greedy and always the same: each case covers as many pairs as a few tries find."""
    names = list(axes)
    left = {(a, x, b, y) for a, b in itertools.combinations(range(len(names)), 2)
            for x, one in enumerate(axes[names[a]]) for y, other in enumerate(axes[names[b]])
            if (one, other) not in APART}
    while left:
        a, x, b, y = min(left)
        picked = {a: x, b: y}
        for axis in range(len(names)):
            if axis not in picked:
                picked[axis] = max(_together(axes, picked, axis), key=lambda value, axis=axis: (
                    _covered(left, picked, axis, value), -value))
        yield Case(*(axes[name][picked[i]] for i, name in enumerate(names)))
        left -= {(i, picked[i], j, picked[j]) for i, j in itertools.combinations(range(len(names)),
                                                                                 2)}


def _together(axes: dict[str, Sequence[Any]], picked: dict[int, int], axis: int) -> list[int]:
    """The values of an axis that go with those picked."""
    values = list(axes.values())
    chosen = [values[other][known] for other, known in picked.items()]
    return [i for i, value in enumerate(values[axis])
            if not any({(value, one), (one, value)} & APART for one in chosen)]


def _covered(left: set[tuple[int, int, int, int]], picked: dict[int, int], axis: int,
             value: int) -> int:
    return sum(((other, known, axis, value) if other < axis else (axis, value, other, known))
               in left for other, known in picked.items())
