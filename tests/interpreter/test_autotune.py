"""Calls that ask for the fastest tile get it, forward and backward, and the same results."""

from __future__ import annotations

import pytest
import torch

from flexattn.kernels.triton_config import TritonConfig
from flexattn.runtime import (
    autotune,
    launch_gpu,
    launch_triton,
    launch_triton_backward,
    launch_triton_decode,
)
from tests.interpreter.attend import call_of, gradients, tensors

TUNED = {"autotune": True}
CONFIGS = (TritonConfig(16, 16, 4, 1), TritonConfig(16, 32, 4, 1))


@pytest.fixture
def timer(tmp_path, monkeypatch):
    """Two tiles for each kernel; the timer finds each run faster than the one before."""
    monkeypatch.setattr(launch_triton, "_configs", lambda *_: CONFIGS)
    monkeypatch.setattr(launch_triton_backward, "_configs", lambda *_: (CONFIGS, CONFIGS))
    monkeypatch.setattr(autotune.compile, "cache_directory", lambda: None)
    monkeypatch.setattr(autotune, "_labels", {})
    launch_gpu._choices.clear()
    launch_gpu._backwards.clear()
    seconds = []

    def measured(run):
        run()
        seconds.append(1.0 / (1 + len(seconds)))
        return seconds[-1]

    monkeypatch.setattr(autotune, "gpu_seconds", measured)
    yield seconds
    launch_gpu._choices.clear()
    launch_gpu._backwards.clear()


def test_forward_and_backward(timer):
    q, k, v = tensors(1, 2, 1, 40, 50, (16, 16))
    slopes = torch.rand(2, requires_grad=True)

    def alibi(score, b, h, q_idx, kv_idx):
        return score + slopes[h] * (kv_idx - q_idx)

    d_out, d_lse = torch.randn(1, 2, 40, 16), torch.randn(1, 2, 40)
    plain = gradients(q, k, v, alibi, None, [slopes], d_out, d_lse)
    assert not timer
    tuned = gradients(q, k, v, alibi, None, [slopes], d_out, d_lse, TUNED)
    for found, wanted in zip(tuned, plain, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)  # other orders of sums
    assert len(timer) == 2 + 4, "two tiles forward, two for each of two kernels backward"
    forward, backward = (list(d.values())[-1].prepared for d in (launch_gpu._choices,
                                                                 launch_gpu._backwards))
    assert forward.config == backward.kv_config == backward.q_config == CONFIGS[-1]
    assert forward.tile["tile_kv"] == backward.tile["dq_tile_kv"] == 32
    gradients(q, k, v, alibi, None, [slopes], d_out, d_lse, TUNED)
    assert len(timer) == 6, "found again"


def test_a_tuned_decoding(timer):
    q, k, v = tensors(1, 1, 2, 1, 60, (16, 16))
    found = launch_gpu.forward(call_of(q, k, v, options=TUNED))
    torch.testing.assert_close(found.out, launch_gpu.forward(call_of(q, k, v)).out)
    assert len(timer) == 1 + 2, "decoding has one tile here, and the kernel for long rows two"


@pytest.mark.parametrize("kv_len, kernels", [(10, ["alone", "dealt"]), (200, ["dealt"])])
def test_a_decoding_names_the_kernels_it_has_made(kv_len, kernels):
    """One that splits the keys, and one that does not where it has served."""
    q, k, v = tensors(1, 1, 2, 1, kv_len, (16, 16))
    prepared = next(launch_triton_decode.candidates(call_of(q, k, v)))
    prepared._dealt.function = "dealt"
    if "_alone" in prepared.__dict__:
        prepared._alone.function = "alone"
    assert prepared.functions == kernels


def test_a_growing_cache_prepares_nothing(timer, monkeypatch):
    """The kernel for decoding, if it is the fastest, serves keys of any length."""
    def measured(run):
        timer.append(1.0 + len(timer))
        return timer[-1]

    monkeypatch.setattr(autotune, "gpu_seconds", measured)
    found = [launch_gpu.choice(call_of(*tensors(1, 1, 2, 1, n, (16, 16)), options=TUNED))
             for n in (40, 41, 64)]
    assert found[0].kernel == "triton decode" and len(timer) == 3
    assert all(other is found[0] for other in found)


def test_lengths_of_a_magnitude_are_timed_once(timer):
    for n in (40, 50):
        launch_gpu.forward(call_of(*tensors(1, 1, 2, n, n, (16, 16)), options=TUNED))
    assert len(timer) == 2


def test_what_a_graph_captures(timer, monkeypatch):
    """What was found before; if nothing was, the first tile, which is not kept."""
    call = call_of(*tensors(1, 2, 1, 40, 50, (16, 16)), options=TUNED)
    for tuned_before in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(autotune, "postponed", autotune.asked)
            captured = launch_gpu.choice(call)
        assert len(timer) == 2 * tuned_before
        assert captured.prepared.config == CONFIGS[tuned_before]
        tuned = launch_gpu.choice(call)
        assert tuned.prepared.config == CONFIGS[-1] and (captured is tuned) == tuned_before
