"""The backward pass in torch operations, one band of query rows at a time.

In: a Call, its Result and the gradients of out and lse. Out: Gradients. Memory is a band of rows
times kv_len, never Q x KV. It serves every mod and dtype, at the speed of unfused operations; its
use is announced once by a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from flexattn.analysis.block_sparsity import EMPTY, PARTIAL, kinds_of_runs
from flexattn.analysis.gradient import Gradient, gradient
from flexattn.ir.evaluate import evaluate
from flexattn.ir.graph import Node
from flexattn.runtime.call import Call, Gradients, Result
from flexattn.trace import Mod

_BAND = 1 << 22  # elements of scores at once


@cache
def announce() -> None:
    """Once a process."""
    warnings.warn("flexattn: the backward pass runs in unfused torch operations on this device; "
                  "results are right, a fused kernel is not available yet.", stacklevel=2)


@cache
def _gradient_of(mod_graph: object) -> Gradient:
    return gradient(mod_graph)  # type: ignore[arg-type]


def backward(call: Call, result: Result, d_out: Tensor, d_lse: Tensor | None) -> Gradients:
    """Gradients of query, key, value and the score mod's captured tensors."""
    announce()
    assert result.lse is not None
    return _Backward(call, result, d_out, d_lse).run()


class _Backward:
    def __init__(self, call: Call, result: Result, d_out: Tensor, d_lse: Tensor | None) -> None:
        self.call = call
        work = torch.float64 if call.query.dtype is torch.float64 else torch.float32
        batch, heads = call.query.shape[:2]
        self.kv_heads = call.key.shape[1]
        self.repeat = heads // max(self.kv_heads, 1)
        k, v = (t.detach().to(work).expand(batch, -1, -1, -1) for t in (call.key, call.value))
        self.k, self.v = (t.repeat_interleave(self.repeat, 1) for t in (k, v))
        self.q, self.d_out = call.query.detach().to(work), d_out.to(work)
        self.lse = result.lse
        self.delta = (self.d_out * result.out.to(work)).sum(-1)
        if d_lse is not None:
            self.delta = self.delta - d_lse
        self.gradient = None if call.score is None else _gradient_of(call.score.graph)
        captures = () if call.score is None else call.score.captures
        self.d_captures = [torch.zeros(c.shape, dtype=work) if c.requires_grad else None
                           for c in captures]

    def run(self) -> Gradients:
        batch, heads, q_len, _ = self.q.shape
        dq, dk, dv = (torch.zeros_like(t) for t in (self.q, self.k, self.v))
        step = max(_BAND // max(batch * heads * self.k.shape[2], 1), 1)
        for top in range(0, q_len, step):
            rows = slice(top, min(top + step, q_len))
            weights, d_score = self._band(rows)
            dv += weights.transpose(-1, -2) @ self.d_out[:, :, rows]
            dq[:, :, rows] = d_score @ self.k
            dk += d_score.transpose(-1, -2) @ self.q[:, :, rows]
        call = self.call
        return Gradients(dq.to(call.query.dtype), self._reduce(dk, call.key),
                         self._reduce(dv, call.value), tuple(
            None if d is None else d.to(c.dtype)
            for d, c in zip(self.d_captures, call.score.captures if call.score else (),
                            strict=True)))

    def _band(self, rows: slice) -> tuple[Tensor, Tensor]:
        """The attention weights, and the gradient of q.k, of some query rows."""
        call = self.call
        raw = call.scale * (self.q[:, :, rows] @ self.k.transpose(-1, -2))
        inputs = self._indices(rows)
        score = _score(call.score, raw, inputs)
        keep = self._keep(inputs, rows)
        if keep is not None:
            score = torch.where(keep, score, -torch.inf)
        lse = self.lse[:, :, rows, None]  # type: ignore[index]
        weights = torch.where(score == -torch.inf, 0.0, torch.exp(score - lse))
        inner = self.d_out[:, :, rows] @ self.v.transpose(-1, -2)
        grad = weights * (inner - self.delta[:, :, rows, None])
        if self.gradient is not None:
            grad = self._through_mod(raw, grad, inputs)
        return weights, grad * call.scale

    def _indices(self, rows: slice) -> dict[str, Tensor]:
        batch, heads = self.q.shape[:2]
        return {"b": torch.arange(batch).view(-1, 1, 1, 1),
                "h": torch.arange(heads).view(-1, 1, 1),
                "q_idx": torch.arange(rows.start, rows.stop).view(-1, 1),
                "kv_idx": torch.arange(self.k.shape[2])}

    def _keep(self, inputs: dict[str, Tensor], rows: slice) -> Tensor | None:
        mask = self.call.block_mask
        if mask is None:
            return None
        table = mask.rows()
        kinds = kinds_of_runs(table, -(-mask.seq_lengths[1] // table.col_block))
        kinds = kinds[:, :, inputs["q_idx"][:, 0] // table.row_block]
        kinds = kinds[..., inputs["kv_idx"] // table.col_block]
        if self.call.mask is None:
            return kinds != EMPTY
        mod = self.call.mask
        keep = evaluate(mod.graph, inputs, mod.captures, mod.numbers)["mask"]
        return torch.where(kinds == PARTIAL, keep, kinds != EMPTY)

    def _through_mod(self, raw: Tensor, grad: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        mod, derived = self.call.score, self.gradient
        assert mod is not None and derived is not None
        captures = [c.detach() for c in mod.captures]
        everything = {**inputs, "score": raw, "grad": grad}
        out = evaluate(derived.graph, everything, captures, mod.numbers)
        attended = grad != 0
        for i, load in enumerate(derived.loads):
            self._scatter(load, torch.where(attended, out[f"d_load{i}"], 0.0), everything, captures)
        return torch.where(attended, out["d_score"], 0.0)

    def _scatter(self, load: Node, part: Tensor, inputs: dict[str, Tensor],
                 captures: Sequence[Tensor]) -> None:
        mod, total = self.call.score, self.d_captures[load.attr]
        assert mod is not None and total is not None
        if not load.args:
            total += part.sum()
            return
        graph = mod.graph.replace_outputs(*((str(d), a) for d, a in enumerate(load.args)))
        found = evaluate(graph, inputs, captures, mod.numbers)
        at = [torch.where(i < 0, i + size, i).clamp(0, size - 1).expand(part.shape)
              for i, size in zip((found[str(d)] for d in range(len(load.args))), total.shape,
                                 strict=True)]
        total.index_put_(tuple(at), part.to(total.dtype), accumulate=True)

    def _reduce(self, grad: Tensor, like: Tensor) -> Tensor:
        """Sum over the query heads of a group, and over the batch where it was broadcast."""
        batch, _, kv_len, dim = grad.shape
        grad = grad.view(batch, self.kv_heads, self.repeat, kv_len, dim).sum(2)
        if like.shape[0] != batch:
            grad = grad.sum(0, keepdim=True)
        return grad.to(like.dtype)


def _score(mod: Mod | None, raw: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    if mod is None:
        return raw
    captures = [c.detach() for c in mod.captures]
    score = evaluate(mod.graph, {**inputs, "score": raw}, captures, mod.numbers)["score"]
    return score.expand(raw.shape)
