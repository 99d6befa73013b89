"""Masks evaluated on all positions, in torch and as a traced graph, against a plain predicate."""

import torch

from flexattn.ir.evaluate import evaluate
from flexattn.trace import specialize, trace_mask_mod


def dense(mask, batch, heads, q_len, kv_len):
    """bool [batch, heads, q_len, kv_len], by vmap over the four indices."""
    for axis in (3, 2, 1, 0):
        mask = torch.vmap(mask, in_dims=tuple(0 if i == axis else None for i in range(4)))
    out = mask(*(torch.arange(n) for n in (batch, heads, q_len, kv_len)))
    assert out.dtype is torch.bool
    return out


def traced(mask, batch, heads, q_len, kv_len):
    """The same through the graph of the mask."""
    mod = specialize(trace_mask_mod(mask))
    sizes = {"b": batch, "h": heads, "q_idx": q_len, "kv_idx": kv_len}
    inputs = {name: torch.arange(n).view([-1 if i == axis else 1 for i in range(4)])
              for axis, (name, n) in enumerate(sizes.items())}
    out = evaluate(mod.graph, inputs, mod.captures, mod.numbers, refuse)["mask"]
    return out.expand(batch, heads, q_len, kv_len)


def refuse(load, dimension, index, size):
    """Library masks never read outside of a captured tensor."""
    raise AssertionError(f"{load}: {index.min()} to {index.max()} of {size}")


def check(mask, attends, q_len, kv_len=None, *, batch=1, heads=1):
    """The mask is True exactly where attends(b, h, q, kv) is."""
    kv_len = q_len if kv_len is None else kv_len
    got = dense(mask, batch, heads, q_len, kv_len)
    assert torch.equal(traced(mask, batch, heads, q_len, kv_len), got)
    table = got.tolist()
    for b in range(batch):
        for h in range(heads):
            for q in range(q_len):
                expected = [bool(attends(b, h, q, kv)) for kv in range(kv_len)]
                assert table[b][h][q] == expected, (b, h, q)


def random_ids(rng, length, count):
    """Ids of contiguous documents, as a list; ids are distinct and in no order."""
    cuts = sorted(rng.sample(range(1, length), count - 1))
    names = rng.sample(range(-5, 50), count)
    return [names[sum(cut <= i for cut in cuts)] for i in range(length)]
