"""Which score mods are found to be lines over the keys."""

from __future__ import annotations

import pytest
import torch

from flexattn import mods
from flexattn.runtime.call import Call
from flexattn.runtime.gpu_mods import mod_code
from flexattn.trace import specialize, trace_score_mod

SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])

LINES = {
    "alibi": (mods.alibi(SLOPES), "return (head[0], rows[0],)"),
    "bias first": (lambda s, b, h, q, k: (k - q) * SLOPES[h] + s, "return (head[0], rows[0],)"),
    "distance": (lambda s, b, h, q, k: s + SLOPES[h] * (q - k), "return (-(head[0]), rows[0],)"),
    "subtracted": (lambda s, b, h, q, k: s - SLOPES[h] * (q - k), "return (head[0], rows[0],)"),
    "a number": (lambda s, b, h, q, k: s + 0.25 * (k - q), "return (0.25, rows[0],)"),
}
OTHERS = {
    "scaled": lambda s, b, h, q, k: 2 * s + SLOPES[h] * (k - q),
    "absolute": lambda s, b, h, q, k: s - SLOPES[h] * (k - q).abs(),
    "slope of a row": lambda s, b, h, q, k: s + SLOPES[q % 4] * (k - q),
    "of the key alone": lambda s, b, h, q, k: s + SLOPES[h] * k,
    "out of range": lambda s, b, h, q, k: s + SLOPES[h + 1] * (k - q),
    "squared": lambda s, b, h, q, k: s + SLOPES[h] * (k - q) * (k - q),
}


@pytest.fixture(autouse=True)
def nothing_seen_before(monkeypatch):
    """A number that kept one value is a constant: other tests must not have varied it."""
    monkeypatch.setattr("flexattn.trace.tracer._skeletons", {})


def text_of(score_mod):
    q = torch.empty(2, 4, 1024, 64, dtype=torch.bfloat16)
    return mod_code(Call(q, q, q, 1.0, specialize(trace_score_mod(score_mod)), None), "cuda")


@pytest.mark.parametrize("name", LINES)
def test_lines(name):
    score_mod, wanted = LINES[name]
    code = text_of(score_mod)
    assert code.sloped
    line = code.text[code.text.index("def score_line("):]
    assert wanted.replace(",)", ")") in line


@pytest.mark.parametrize("name", OTHERS)
def test_other_mods(name):
    assert not text_of(OTHERS[name]).sloped
