"""Mods evaluated on all positions, in torch and as a traced graph, against a plain function."""

import torch

from flexattn.ir.evaluate import evaluate
from flexattn.trace import specialize, trace_score_mod


def dense(mod, scores):
    """The mod on scores [B, H, Q, KV], by vmap over the four indices."""
    for axis in (3, 2, 1, 0):
        mod = torch.vmap(mod, in_dims=(0, *(0 if i == axis else None for i in range(4))))
    return mod(scores, *(torch.arange(n) for n in scores.shape))


def traced(mod, scores):
    """The same through the graph of the mod."""
    made = specialize(trace_score_mod(mod, scores.dtype))
    indices = [torch.arange(n).view([-1 if i == axis else 1 for i in range(4)])
               for axis, n in enumerate(scores.shape)]
    inputs = dict(zip(("score", "b", "h", "q_idx", "kv_idx"), [scores, *indices], strict=True))
    out = evaluate(made.graph, inputs, made.captures, made.numbers)["score"]
    return out.expand_as(scores)


def check(mod, expected, shape, *, scale=2.0, tolerance=1e-5):
    """expected(score, b, h, q, kv) in Python floats (float64) at every position; float32 mod."""
    scores = scale * torch.randn(shape)
    got = dense(mod, scores)
    assert got.dtype is torch.float32
    torch.testing.assert_close(traced(mod, scores), got)
    want = torch.empty(shape, dtype=torch.float64)
    for where in torch.cartesian_prod(*(torch.arange(n) for n in shape)).tolist():
        want[tuple(where)] = expected(scores[tuple(where)].item(), *where)
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
