"""Mods of the score: caps, temperatures, biases given by hand, functions other than softmax."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flexattn.errors import ArgumentError, ShapeError, message
from flexattn.mods.arguments import Index, ScoreMod, positive, table


def softcap(cap: float) -> ScoreMod:
    """Scores bounded smoothly: `cap * tanh(score / cap)`.

    Source: Gemma 2, Gemma Team 2024, https://arxiv.org/abs/2408.00118 (50 in attention).
    Errors: ArgumentError unless cap > 0.
    """
    cap = positive("cap", cap)

    def mod(score: Tensor, b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Tensor:
        return cap * torch.tanh(score / cap)

    return mod


def temperature(value: float | Tensor) -> ScoreMod:
    """Softer or sharper attention: `score / value`.

    value: a number > 0, or a floating point tensor of shape [] or, one per query head, [H]; a
    learned temperature is a tensor with requires_grad.
    """
    if isinstance(value, Tensor):
        divisor = table("value", value, "[]", "[H]")
        return lambda score, b, h, q_idx, kv_idx: score / (divisor[h] if divisor.dim() else divisor)
    number = positive("value", value)
    return lambda score, b, h, q_idx, kv_idx: score / number


def head_bias(bias: Tensor) -> ScoreMod:
    """A learned number per head: `score + bias[h]`.

    bias: floating point [H]. On its own it cancels in the softmax (its gradient is 0); it acts
    before `softcap` or in `activation`, such as sigmoid attention.

    Source: sigmoid attention, Ramapuram et al. 2024, https://arxiv.org/abs/2409.04431 (its b).
    """
    bias = table("bias", bias, "[H]")

    def mod(score: Tensor, b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Tensor:
        return score + bias[h]

    return mod


def learned_bias(bias: Tensor) -> ScoreMod:
    """A bias for every pair of positions: `score + bias[b, h, q_idx, kv_idx]`.

    bias: floating point [Q, KV], [H, Q, KV] or [B, H, Q, KV], where B and H may be 1. It is read
    where it lies: a triangle bias or a pair representation needs no copy.

    Source: AlphaFold, Jumper et al. 2021 (pair bias).
    """
    bias = table("bias", bias, "[Q, KV]", "[H, Q, KV]", "[B, H, Q, KV]")
    leading = bias.shape[:-2]

    def mod(score: Tensor, b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Tensor:
        owner = (b, h)[2 - len(leading) :]
        shared = tuple(0 if size == 1 else i for i, size in zip(owner, leading, strict=True))
        return score + bias[(*shared, q_idx, kv_idx)]

    return mod


def activation(function: Callable[[Tensor], Tensor]) -> ScoreMod:
    """Attention that weighs values by `function(score)` in place of the softmax.

    The score becomes `log(function(score))`, so that the softmax's numerator is the function;
    `undo_softmax` takes back its denominator: `out[q] = sum_kv function(score) * value[kv]`. The
    mask still applies. Where the function is 0 the weight, and the gradient, is exactly 0.

    function: elementwise, never negative; relu, relu squared, sigmoid, exp, softplus. What is
    negative counts as 0. In float32 the weights lie within the range of exp: 1e-38 to 1e38.

    Errors: ArgumentError for what is no function.
    Source: ReLU attention, Wortsman et al. 2023, https://arxiv.org/abs/2309.08586; sigmoid
    attention, Ramapuram et al. 2024, https://arxiv.org/abs/2409.04431.
    Example:
        mod = activation(torch.sigmoid)
        out, aux = flex_attention(q, k, v, mod, return_aux=AuxRequest(lse=True))
        out = undo_softmax(out, aux.lse)
    """
    if not callable(function):
        raise ArgumentError(message("the activation is not a function", got=repr(function),
                                    expected="a function of a score, such as torch.sigmoid"))

    def mod(score: Tensor, b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Tensor:
        weight = function(score)
        unused = weight <= 0
        return torch.where(unused, -torch.inf, torch.log(torch.where(unused, 1.0, weight)))

    return mod


def undo_softmax(out: Tensor, lse: Tensor) -> Tensor:
    """Attention without the softmax's denominator: `out * exp(lse)`, differentiable in both.

    out: [B, H, Q, D]; lse: float [B, H, Q], the natural logarithm, as flex_attention returns it.
    Rows without any weight (lse = -inf) stay 0. Computed in lse's dtype, returned in out's.

    Errors: ShapeError if lse is not out without its last dimension.
    """
    if out.shape[:-1] != lse.shape:
        raise ShapeError(message("lse does not belong to out", expected=str(list(out.shape[:-1])),
                                 got=str(list(lse.shape))))
    return (out * torch.exp(lse).unsqueeze(-1)).to(out.dtype)


def attention_sink(out: Tensor, lse: Tensor, sink: Tensor) -> Tensor:
    """Attention with one more, empty key of score `sink`: `out * sigmoid(lse - sink)`.

    The sink takes its share `exp(sink) / (exp(sink) + sum_kv exp(score))` of each row's softmax
    and adds no value; it is differentiable like out and lse, and needs no second pass.

    out: [B, H, Q, D]; lse: float [B, H, Q], the natural logarithm, as flex_attention returns it;
    sink: floating point [H] or [], usually learned. A row that attends nothing stays 0.

    Errors: ShapeError where the shapes do not fit.
    Source: gpt-oss, OpenAI 2025 (its `sinks`); StreamingLLM's softmax-off-by-one is sink = 0.
    Example:
        out, aux = flex_attention(q, k, v, return_aux=AuxRequest(lse=True))
        out = attention_sink(out, aux.lse, sinks)
    """
    if out.shape[:-1] != lse.shape or tuple(sink.shape) not in ((), (out.shape[1],)):
        raise ShapeError(message("out, lse and sink do not fit together",
                                 expected="[B, H, Q, D], [B, H, Q] and [H] or []",
                                 got=f"{list(out.shape)}, {list(lse.shape)}, {list(sink.shape)}"))
    share = torch.sigmoid(lse - (sink[:, None] if sink.dim() else sink))
    return (out * share.unsqueeze(-1)).to(out.dtype)


def chain(*mods: ScoreMod) -> ScoreMod:
    """Mods one after the other, the first one first: `chain(alibi(slopes), softcap(30))`.

    Without mods: the score itself. Errors: ArgumentError for a mod that is no function.
    """
    for one in mods:
        if not callable(one):
            raise ArgumentError(message("a mod of the chain is not a function", got=repr(one),
                                        expected="score_mod(score, b, h, q_idx, kv_idx)"))

    def mod(score: Tensor, b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Tensor:
        for one in mods:
            score = one(score, b, h, q_idx, kv_idx)
        return score

    return mod
