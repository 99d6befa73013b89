"""Models of transformers on a GPU: logits, gradients and generated tokens are those of eager."""

from __future__ import annotations

from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from flexattn.integrations.transformers import register
from tests.integrations.tiny_models import VOCABULARY, loss_and_gradients, padded, pair

NAMES = ["llama", "gemma2", "gpt_oss", "bert"]


def models(name: str) -> tuple[Any, Any]:
    register()
    eager, ours = pair(name)
    return eager.cuda(), ours.cuda()


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_gradients_are_eagers(name: str, rng: Any) -> None:
    eager, ours = models(name)
    total = int(rng.integers(130, 300))
    tokens, real = (t.cuda() for t in padded([int(rng.integers(60, total)), total], total, True))
    wanted, wanted_gradients = loss_and_gradients(eager, tokens, real)
    logits, gradients = loss_and_gradients(ours, tokens, real)
    kept = real.bool()
    assert (logits[kept] - wanted[kept]).abs().max() < 1e-3 * wanted[kept].abs().max()
    noise = 1e-5 * max(float(g.abs().max()) for g in wanted_gradients.values())
    for key, gradient in gradients.items():
        error = float((gradient - wanted_gradients[key]).abs().max())
        assert error < 2e-3 * float(wanted_gradients[key].abs().max()) + noise, key


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", NAMES[:3])
def test_generation_is_eagers(name: str, cache: str, rng: Any) -> None:
    eager, ours = models(name)
    total = int(rng.integers(20, 60))
    tokens, real = (t.cuda() for t in padded([total // 2, total], total, left=True))
    options = {"attention_mask": real, "max_new_tokens": 16, "do_sample": False,
               "return_dict_in_generate": True, "output_logits": True, "disable_compile": True}
    got = ours.generate(tokens, cache_implementation=cache, **options)
    wanted = eager.generate(tokens, **options)
    for row, (mine, theirs) in enumerate(zip(got.sequences, wanted.sequences, strict=True)):
        for i in (mine != theirs).nonzero()[:1, 0].tolist():
            first, second = wanted.logits[i - total][row].topk(2).values
            assert first - second < 1e-2, f"token {i}"
    assert got.sequences.max() < VOCABULARY
