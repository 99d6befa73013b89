"""Which kernel a call gets, how its work is divided, and what a call leaves behind."""

from __future__ import annotations

import pytest
import torch

from flexattn import compile
from flexattn.runtime import cpu_call, launch_cpu
from flexattn.runtime.launch_cpu import forward
from tests.kernels.cpu_attend import call_of, causal, check, softcap, tensors


@pytest.fixture
def kernels(monkeypatch):
    """Names of the kernels that calls get."""
    seen = []
    for name in ("_run_forward", "_run_decode"):
        run = getattr(launch_cpu, name)
        monkeypatch.setattr(launch_cpu, name, lambda *args, name=name, run=run: (
            seen.append(name.removeprefix("_run_")), run(*args)))
    return seen


@pytest.mark.parametrize("q_len, expected", [(1, "decode"), (8, "decode"), (9, "forward")])
def test_few_queries_decode(kernels, q_len, expected):
    check(*tensors((1, 2, 2, q_len, 300, 64, 64)), softcap)
    assert kernels == [expected]


def test_what_decoding_does_not_take(kernels):
    q, k, v = tensors((1, 2, 2, 3, 300, 64, 64))
    check(q, k.transpose(2, 3).contiguous().transpose(2, 3), v)
    check(*tensors((1, 2, 2, 3, 300, 63, 64)))
    check(q, k, v, None, lambda b, h, q, kv: q + 200 >= kv, block=(2, 128))
    assert kernels == ["forward"] * 3


@pytest.mark.parametrize("stacks", [1, 3, 8, 100])
@pytest.mark.parametrize("team", [1, 2, 16])
def test_splits_cover_the_keys(stacks, team):
    for kv_len in (1, 511, 512, 1025, 2048, 40000):
        splits, keys = launch_cpu._splits(stacks, kv_len, team)
        assert (splits - 1) * keys < kv_len <= splits * keys
        assert splits == 1 or keys >= 512 - 64
        assert team > 1 or splits == 1


@pytest.mark.parametrize("block", [16, 100, 128, 2048])
@pytest.mark.parametrize("rows", [1, 8, 300])
@pytest.mark.parametrize("team", [1, 2, 16])
def test_tiles_cover_a_block(block, rows, team):
    parts, size = launch_cpu._tiling(block, 64, rows, team)
    assert (parts - 1) * size < block <= parts * size and size <= 64


def test_the_output_has_the_querys_layout():
    q, k, v = tensors((2, 2, 2, 40, 50, 64, 32))
    assert forward(call_of(q, k, v)).out.is_contiguous()
    heads_last = q.transpose(1, 2).contiguous().transpose(1, 2)
    assert forward(call_of(heads_last, k, v)).out.transpose(1, 2).is_contiguous()


def test_nothing_asked_for_nothing_given():
    result = forward(call_of(*tensors((1, 1, 1, 20, 20, 16, 16))).__class__(
        *tensors((1, 1, 1, 20, 20, 16, 16)), 0.25))
    assert result.lse is None and result.max_scores is None


def test_inputs_are_only_read(rng):
    q, k, v = tensors((1, 2, 2, 70, 90, 64, 64))
    kept = [x.clone() for x in (q, k, v)]
    forward(call_of(q, k, v, softcap, causal))
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), kept, strict=True))


def test_one_plan_for_a_mod_and_dtype(monkeypatch):
    monkeypatch.setattr(cpu_call, "_plans", {})
    for length in (20, 30, 300):
        forward(call_of(*tensors((1, 1, 1, length, length, 64, 64)), softcap))
    assert len(cpu_call._plans) == 1
    forward(call_of(*tensors((1, 1, 1, 20, 20, 64, 64), torch.bfloat16), softcap))
    forward(call_of(*tensors((1, 1, 1, 20, 20, 64, 64)), softcap, causal))
    assert len(cpu_call._plans) == 3


def test_a_tiny_call_wakes_no_team(monkeypatch):
    teams = []
    monkeypatch.setattr(launch_cpu.threads, "run", lambda f, a, team: (teams.append(team), f(a)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    check(*tensors((1, 1, 1, 16, 16, 16, 16)))
    check(*tensors((1, 2, 1, 500, 500, 16, 16)))
    assert teams == [1, 2]


def test_indices_beyond_16_bits(rng):
    """q_idx * kv_idx passes 2**31 from 46341 on."""
    length = 50_000
    q, k, v = tensors((1, 1, 1, 1, length, 16, 16))
    check(q, k, v, lambda s, b, h, q, kv: s + ((kv * kv) % 7 == 4))


def test_narrower_code_where_lengths_are_short():
    bounds = [cpu_call.index_bound(call_of(*tensors((1, 1, 1, 10, n, 16, 16))))
              for n in (10, 2**15 - 75, 2**15)]
    assert bounds == [2**15, 2**15, 2**30]


def test_without_a_disk_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(compile, "cache_directory", lambda: None)
    monkeypatch.setattr(compile, "_libraries", {})
    monkeypatch.setattr(cpu_call, "_plans", {})
    check(*tensors((1, 1, 1, 20, 30, 24, 24)), softcap)
