"""Which masks attend one stretch of keys in each row, and its ends, against plain Python."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import pytest
import torch

from flexattn import compile as objects
from flexattn.kernels.cpu_dsl import Module
from flexattn.kernels.cpu_sites import RowSite
from flexattn.lower.llvm_mod import LlvmMod, argument_words
from flexattn.trace import Mod, specialize, trace_mask_mod

LARGE = 2**63 - 1


def ends(mod: Mod, q_idx: int, b: int = 0, h: int = 0) -> tuple[int, int]:
    """What the code says of one row."""
    module = Module(objects.host().vector_bits)
    e = module.function("run", ["ptr"] * 3 + ["i64"] * 3, export=True)
    captures, numbers, out, *at = e.params
    low, high = LlvmMod(mod.graph, 2**15).row_stretch(e, RowSite(*at, captures, numbers, out))
    e.store(low, out, 0)
    e.store(high, out, 1)
    e.ret()
    text = str(module)
    run = objects.library(text, lambda: text, ("run",)).function(
        "run", *[ctypes.c_void_p] * 3, *[ctypes.c_int64] * 3)
    tables = [np.array([*words, 0], np.int64)
              for words in argument_words(mod.captures, mod.numbers)]
    result = np.zeros(2, np.int64)
    run(*(t.ctypes.data for t in (*tables, result)), b, h, q_idx)
    return int(result[0]), int(result[1])


MASKS: dict[str, tuple[Callable, Callable]] = {
    "causal": (lambda b, h, q, k: q >= k, lambda q, k: k <= q),
    "shifted": (lambda b, h, q, k: k - 7 < q * 2, lambda q, k: k < 2 * q + 7),
    "window": (lambda b, h, q, k: (q >= k) & (q - k < 9), lambda q, k: q - 9 < k <= q),
    "around": (lambda b, h, q, k: (q - k).abs() <= 4, lambda q, k: q - 4 <= k <= q + 4),
    "near": (lambda b, h, q, k: abs(k - q) < 4, lambda q, k: q - 4 < k < q + 4),
    "not before": (lambda b, h, q, k: ~((k < q) | (k > 30)), lambda q, k: q <= k <= 30),
    "some rows": (lambda b, h, q, k: (q % 3 != 0) & (k > q), lambda q, k: q % 3 and k > q),
    "same": (lambda b, h, q, k: (k - k < 1) & (k < 5), lambda q, k: k < 5),
    "all": (lambda b, h, q, k: k < LARGE, lambda q, k: True),
    "at most all": (lambda b, h, q, k: k <= LARGE, lambda q, k: True),
    "none": (lambda b, h, q, k: q - k > LARGE, lambda q, k: False),
    "very wide": (lambda b, h, q, k: q - k <= LARGE, lambda q, k: True),
    "far back": (lambda b, h, q, k: k - q < -LARGE, lambda q, k: False),
}


@pytest.mark.parametrize("name", MASKS)
def test_stretches(name: str) -> None:
    mask, attended = MASKS[name]
    mod = specialize(trace_mask_mod(mask))
    for q_idx in (0, 1, 2, 5, 12, 33):
        low, high = ends(mod, q_idx)
        assert low >= 0 and high >= 0
        assert list(range(40))[low:high] == [k for k in range(40) if attended(q_idx, k)], q_idx


@pytest.mark.parametrize("size", [3, 5, LARGE, -LARGE - 1])
def test_numbers_and_tensors_without_index(size: int) -> None:
    limit = torch.tensor(size // 2)
    mod = specialize(trace_mask_mod(lambda b, h, q, k: (q - k < size) & (k <= limit + h)))
    low, high = ends(mod, 20, h=2)
    kept = [k for k in range(40) if 20 - k < size and k <= size // 2 + 2]
    assert list(range(40))[low:high] == kept


TABLE = torch.arange(40)


@pytest.mark.parametrize("mask", [
    lambda b, h, q, k: (k <= q) | (k == 7),
    lambda b, h, q, k: k % 2 == 0,
    lambda b, h, q, k: (q - k).abs() > 3,
    lambda b, h, q, k: 2 * k <= q,
    lambda b, h, q, k: k * q <= q,
    lambda b, h, q, k: k <= q / 2,
    lambda b, h, q, k: k + LARGE <= q,
    lambda b, h, q, k: k <= TABLE[q],
], ids=range(8))
def test_others_are_left_to_the_mask(mask: Callable) -> None:
    assert not LlvmMod(specialize(trace_mask_mod(mask)).graph, 2**15).is_stretch


def test_wrapping_sides_are_left_to_the_mask() -> None:
    large = 2**62
    mod = specialize(trace_mask_mod(lambda b, h, q, k: k + large < q + large))
    assert not LlvmMod(mod.graph, 2**15).is_stretch
