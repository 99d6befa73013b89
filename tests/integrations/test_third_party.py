"""Code written for torch's flex_attention, unchanged, runs ours under replace_torch."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

import flexattn
from flexattn.integrations import replace_torch as routes
from tests.integrations import third_party

pytestmark = pytest.mark.usefixtures("rng")
LENGTH = 70


def formula(score_mod: Any, mask_mod: Any, q: Any, k: Any, v: Any) -> torch.Tensor:
    b, h, i, j = (torch.arange(n).view([-1 if d == e else 1 for e in range(4)])
                  for d, n in enumerate((*q.shape[:2], LENGTH, LENGTH)))
    score = q @ k.mT / q.shape[-1] ** 0.5
    if score_mod is not None:
        score = score_mod(score, b, h, i, j)
    kept = mask_mod(b, h, i, j).expand_as(score)
    return score.masked_fill(~kept, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", third_party.GALLERY)
def test_a_gallery_of_masks_and_mods(name: str, compiled: bool, monkeypatch: pytest.MonkeyPatch,
                                     ) -> None:
    """Out and gradients, which torch's own function has none of on a CPU."""
    score_mod, mask_mod = third_party.GALLERY[name]
    attend = third_party.flex_attention_compiled if compiled else third_party.flex_attention
    q, k, v = (torch.randn(2, 4, LENGTH, 16, requires_grad=True) for _ in range(3))
    calls = []
    ours = routes.flex_attention
    monkeypatch.setattr(routes, "flex_attention", lambda **a: calls.append(0) or ours(**a))
    with flexattn.replace_torch():
        third_party.create_block_mask_cached.cache_clear()
        mask = third_party.create_block_mask_cached(mask_mod, None, None, LENGTH, LENGTH)
        assert isinstance(mask, third_party.BlockMask) and isinstance(mask, flexattn.BlockMask)
        out = attend(q, k, v, score_mod=score_mod, block_mask=mask)
        weights = torch.randn_like(out)
        found = torch.autograd.grad(out, (q, k, v), weights)
    wanted = formula(score_mod, mask_mod, q, k, v)
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
    for one, other in zip(found, torch.autograd.grad(wanted, (q, k, v), weights), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert calls


def test_a_trainers_module() -> None:
    """A step with torch's class of mask is the step with a mask tensor."""
    net = third_party.SelfAttention()
    x = torch.randn(2, LENGTH, 32)
    _, mask_mod = third_party.GALLERY["documents"]
    grads = []
    with flexattn.replace_torch():
        for mask in (third_party.create_block_mask(mask_mod, None, None, LENGTH, LENGTH, "cpu"),
                     third_party.dense_mask(mask_mod, LENGTH)):
            net.zero_grad()
            net(x, mask).square().mean().backward()
            grads.append([p.grad.clone() for p in net.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_replacement_that_nobody_ends_lasts_for_the_process() -> None:
    """And torch's module is not imported before it is asked for."""
    code = ("import gc, sys, torch, flexattn\n"
            "name = 'torch.nn.attention.flex_attention'\n"
            "assert name not in sys.modules\n"
            "flexattn.replace_torch()\n"
            "gc.collect()\n"
            "from tests.integrations import third_party\n"
            "q = torch.randn(1, 4, 50, 16, requires_grad=True)\n"
            "mask = third_party.create_block_mask_cached(third_party.causal_mask, 1, 1, 50, 50)\n"
            "third_party.flex_attention(q, q, q, block_mask=mask).sum().backward()\n"
            "print(type(mask).__mro__[1].__module__, q.grad.shape[2])")
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert told.stdout.split() == ["flexattn.block_mask.mask", "50"], told.stderr
