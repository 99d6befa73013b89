"""Generated device functions against golden text: `pytest tests/lower/test_triton.py
--update-golden` writes it anew, to be read in the diff."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from flexattn.lower.triton_ops import literal
from flexattn.runtime.call import Call
from flexattn.runtime.gpu_mods import mod_code
from flexattn.trace import specialize, trace_mask_mod, trace_score_mod

GOLDEN = Path(__file__).parent / "golden"
HEADS, LENGTH = 4, 1024
SLOPES, TABLE = torch.ones(HEADS), torch.ones(HEADS, 2 * LENGTH, requires_grad=True)
DOCUMENT = torch.zeros(LENGTH, dtype=torch.int32)


def softcap(score, b, h, q_idx, kv_idx):
    return 20 * torch.tanh(score / 20)


def alibi(score, b, h, q_idx, kv_idx):
    return score + SLOPES[h] * (kv_idx - q_idx)


def relative_bias(score, b, h, q_idx, kv_idx):
    return score + TABLE[h, q_idx - kv_idx + LENGTH]


def unproven_bias(score, b, h, q_idx, kv_idx):
    return score * TABLE[h, 3 * q_idx - kv_idx]


def window(b, h, q_idx, kv_idx):
    return (q_idx >= kv_idx) & (q_idx - kv_idx <= 256)


def documents(b, h, q_idx, kv_idx):
    return DOCUMENT[q_idx] == DOCUMENT[kv_idx]


CASES = {
    "softcap_cuda": (softcap, None, "cuda", torch.bfloat16),
    "softcap_hip_causal": (softcap, window, "hip", torch.float16),
    "softcap_float32": (softcap, None, "cuda", torch.float32),
    "alibi_window": (alibi, window, "cuda", torch.bfloat16),
    "documents": (None, documents, "cuda", torch.bfloat16),
    "relative_bias": (relative_bias, None, "cuda", torch.bfloat16),
    "unproven_bias_documents": (unproven_bias, documents, "cuda", torch.bfloat16),
}


def generated(score_mod, mask_mod, target, dtype, with_gradient=True):
    """The text for a call of this dtype."""
    q = torch.empty(2, HEADS, LENGTH, 64, dtype=dtype)
    call = Call(q, q, q, 1.0, score_mod and specialize(trace_score_mod(score_mod)),
                mask_mod and specialize(trace_mask_mod(mask_mod)))
    return mod_code(call, target, with_gradient).text


@pytest.fixture(autouse=True)
def nothing_seen_before(monkeypatch):
    """A number that kept one value is a constant: other tests must not have varied it."""
    monkeypatch.setattr("flexattn.trace.tracer._skeletons", {})


@pytest.mark.parametrize("name", CASES)
def test_golden(name, request):
    text = generated(*CASES[name])
    path = GOLDEN / f"{name}.txt"
    if request.config.getoption("--update-golden"):
        path.write_text(text)
    assert path.exists(), "no golden text: --update-golden"
    assert text == path.read_text()


def test_lengths_batches_and_numbers_share_one_text():
    texts = set()
    for length in (64, 100, 4096, 100_000):
        for bound in (10, 77, 5000):
            q = torch.empty(1, 1, 1, 64).expand(3, HEADS, length, 64)
            mask = specialize(trace_mask_mod(lambda b, h, q_idx, kv_idx, n=bound:
                                             q_idx - kv_idx < n))
            texts.add((mod_code(Call(q, q, q, 1.0, None, mask), "cuda").text, mask.graph))
    assert len({text for text, graph in texts if graph is mask.graph}) == 1
    assert len(texts) <= 2  # a bound seen once is a constant


def test_long_tensors_get_64_bit_offsets():
    long = torch.empty(1, 1, 1).expand(3, 1 << 20, 1 << 12)  # its gradient has 3 * 2^32 elements
    q = torch.empty(1, 1, 1, 64).expand(1, HEADS, 4096, 64)
    score = specialize(trace_score_mod(lambda score, b, h, q_idx, kv_idx:
                                       score + long[h % 3, q_idx, kv_idx]))
    code = mod_code(Call(q, q, q, 1.0, score), "cuda")
    assert "i64" in code.types and "(q_idx).to(tl.int64)" in code.text


@pytest.mark.parametrize("value", [9.223372036846387e+18, 0.1, 1e300, 5e-324, -1 / 3])
def test_constants_of_float64_keep_their_digits(value):
    """Triton would take them for float32."""
    text = literal(value, torch.float64)
    bits = int(text.removeprefix("tl.cast(").split(",")[0])
    assert np.int64(bits).view(np.float64) == value
    assert literal(0.5, torch.float64) == "tl.cast(0.5, tl.float64)" and literal(0.1) == "0.1"
    assert literal(9, torch.uint8) == "tl.cast(9, tl.uint8)" and literal(9, torch.int64) == "9"
    assert literal(1 << 31, torch.int64) == f"tl.cast({1 << 31}, tl.int64)"
    assert literal(True, torch.bool) == "True"
