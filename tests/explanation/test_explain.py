"""explain says what is true of the call, for a CPU and for a GPU, and runs nothing."""

from __future__ import annotations

import ast
import ctypes
import json

import numpy as np
import pytest
import torch

import flexattn
from flexattn import compile, create_block_mask
from flexattn.explanation import cpu
from flexattn.masks import causal
from flexattn.trace import specialize, trace_mask_mod, trace_score_mod, tracer

pytestmark = pytest.mark.usefixtures("rng")


def inputs(length: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(1, 4, length, 64, dtype=dtype) for _ in range(3)]


def alibi_of(slopes: torch.Tensor):  # type: ignore[no-untyped-def]
    def alibi(score, b, h, q_idx, kv_idx):  # type: ignore[no-untyped-def]
        return score + slopes[h] * (kv_idx - q_idx)

    return alibi


def test_a_mod_its_gradient_and_its_captures() -> None:
    slopes = torch.randn(4, requires_grad=True)
    told = flexattn.explain(*inputs(300), alibi_of(slopes))
    assert told.score is not None and told.mask is None and told.picture is None
    assert told.score.name == "alibi" and f"{__file__}" in told.score.where
    assert told.score.captures == ("float32 [4], gets a gradient",)
    assert "load float32 capture0" in told.score.graph
    assert "return d_load0" in told.score.gradient


def test_numbers_that_vary_are_arguments(rng: np.random.Generator,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexattn.trace.tracer._skeletons", {})  # numbers seen in other tests

    def scaled(factor: float):  # type: ignore[no-untyped-def]
        return lambda score, b, h, q_idx, kv_idx: score * factor + 0.625

    first, second = rng.uniform(2, 3, 2).tolist()
    told = [flexattn.explain(*inputs(8), scaled(x)).score for x in (first, second)]
    assert told[0] is not None and told[0].numbers == ()
    assert told[1] is not None and told[1].numbers == (repr(second),)


@pytest.mark.parametrize("length", [1, 5, 300])
def test_the_kernel_is_the_one_that_serves(length: int) -> None:
    query = torch.randn(1, 4, length, 64)
    key = torch.randn(1, 4, 512, 64)
    forward, backward = flexattn.explain(query, key, key).kernels
    assert forward.file == f"kernels/cpu_{'decode' if length <= 8 else 'forward'}.py"
    assert backward.file == "kernels/cpu_backward.py"
    assert forward.tile["tile_kv"] > 0 and backward.tile["tile_q"] > 0


def test_the_block_mask_is_counted_and_drawn() -> None:
    picture = flexattn.explain(*inputs(512), block_mask=create_block_mask(
        causal, None, None, 512, 512)).picture
    assert picture is not None
    assert (picture.full, picture.partial, picture.empty) == (6, 4, 6)
    assert picture.picture.splitlines()[0] == "▒▒······"
    assert picture.sparsity == 37.5


def test_blocks_of_every_batch_and_head_are_counted() -> None:
    q = torch.randn(2, 3, 512, 16)
    picture = flexattn.explain(q, q, q, block_mask=create_block_mask(
        causal, 2, 3, 512, 512)).picture
    assert picture is not None
    assert (picture.full, picture.partial, picture.empty) == (36, 24, 36)


def test_text_and_dict_hold_everything() -> None:
    told = flexattn.explain(*inputs(256), alibi_of(torch.randn(4)),
                            create_block_mask(causal, None, None, 256, 256))
    text = str(told)
    for title in ("inputs", "score_mod: alibi", "gradient of score_mod", "score_mod in LLVM IR",
                  "mask_mod: causal", "block mask", "forward kernel", "backward kernel"):
        assert f"== {title}" in text
    again = json.loads(json.dumps(told.to_dict()))
    assert again["score"]["graph"] == told.score.graph  # type: ignore[union-attr]


def test_code_for_a_gpu_without_one() -> None:
    slopes = torch.randn(4, requires_grad=True)
    told = flexattn.explain(*inputs(256), alibi_of(slopes),
                            create_block_mask(causal, None, None, 256, 256), target="gpu")
    assert told.language == "Triton" and told.score is not None and told.mask is not None
    for text, name in ((told.score.code, "score_mod"), (told.score.code, "score_mod_grad"),
                       (told.mask.code, "mask_mod")):
        assert f"def {name}(" in text
        ast.parse(text)


def test_the_ir_shown_computes_the_mod(rng: np.random.Generator) -> None:
    """It is compiled and run on one vector of scores."""
    cap = float(rng.uniform(1, 20))
    mod = specialize(trace_score_mod(
        lambda score, b, h, q_idx, kv_idx: cap * torch.tanh(score / cap) + (kv_idx - q_idx)))
    text = cpu.mod_code("score_mod", mod.graph, "float32", 2**15)
    lanes = compile.host().vector_bits // 32
    scores = torch.randn(lanes) * 10
    q_idx, kv_idx = 7, 32
    wanted = cap * torch.tanh(scores.double() / cap) + torch.arange(kv_idx, kv_idx + lanes) - q_idx
    run(text, "score_mod", scores, q_idx, kv_idx)
    torch.testing.assert_close(scores, wanted.float(), rtol=1e-5, atol=1e-5)


def test_the_ir_shown_computes_the_mask(rng: np.random.Generator,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracer, "_skeletons", {})  # no other test has varied the window
    window = int(rng.integers(1, 6))
    mod = specialize(trace_mask_mod(
        lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) & (q_idx - kv_idx < window)))
    text = cpu.mod_code("mask_mod", mod.graph, "float32", 2**15)
    lanes = compile.host().vector_bits // 32
    bits = torch.zeros(lanes, dtype=torch.uint8)
    run(text, "mask_mod", bits, 4, 0)
    wanted = [j <= 4 and 4 - j < window for j in range(lanes)]
    packed = int.from_bytes(bytes(bits.tolist()[:lanes // 8 or 1]), "little")
    assert [bool(packed >> j & 1) for j in range(lanes)] == wanted


def run(text: str, name: str, data: torch.Tensor, q_idx: int, kv_idx: int) -> None:
    library = compile.library(f"explain test {text}", lambda: text, [name])
    words = torch.zeros(8, dtype=torch.int64)
    function = library.function(name, *[ctypes.c_void_p] * 4, *[ctypes.c_long] * 4)
    function(data.data_ptr(), *[words.data_ptr()] * 3, 0, 0, q_idx, kv_idx)
