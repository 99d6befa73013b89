"""Peak GPU memory of one long call beyond its inputs and outputs. O(rows) is the aim: `rate` is
bytes for each row of the query."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch

import flexattn
from benchmarks.gpu_cases import HeadShape, causal_mask
from benchmarks.report import Row

SHAPE = HeadShape(1, 4, 4, 131072, 131072, 128, torch.bfloat16)


def peak(options: argparse.Namespace) -> Iterator[Row]:
    """Causal, forward and forward + backward."""
    length = SHAPE.q_len
    block_mask = flexattn.create_block_mask(causal_mask, None, None, length, length, device="cuda")
    for backward in (False, True):
        q, k, v = SHAPE.inputs(requires_grad=backward)
        d_out = torch.randn_like(q)
        _attend(q, k, v, block_mask, d_out if backward else None)  # compiles, fills caches
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outputs = _attend(q, k, v, block_mask, d_out if backward else None)
        extra = torch.cuda.max_memory_allocated() - before - outputs
        rows = SHAPE.batch * SHAPE.heads * length
        yield Row("causal " + ("fwd+bwd" if backward else "fwd"), str(SHAPE), "bfloat16", "ours",
                  extra / 2**20, "MiB", rate=extra / rows, rate_unit="bytes/row")


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_mask: flexattn.BlockMask,
            d_out: torch.Tensor | None) -> int:
    """Bytes of the outputs."""
    out = flexattn.flex_attention(q, k, v, block_mask=block_mask)
    if d_out is None:
        return out.nbytes
    grads = torch.autograd.grad(out, (q, k, v), d_out)
    return out.nbytes + sum(g.nbytes for g in grads)
