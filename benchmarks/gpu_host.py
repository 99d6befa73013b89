"""What a call on a GPU costs besides the kernel: host time, first calls in fresh processes, and
compiles over many lengths, batches and captured values.

Out: rows; `value` is microseconds, milliseconds or a count, as `unit` says.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import flex_attention as torch_flex

import flexattn
from benchmarks.host import ATTENTIONS, fresh_process, ten_op_mod
from benchmarks.measure import Times
from benchmarks.report import Row

_CALLS = 300  # a round; few enough for the GPU's queue
FIRST_CALL = """
import time, torch
{attention}
import triton
q, k, v = (torch.randn(1, 8, 512, 64, device="cuda", dtype=torch.bfloat16,
                       requires_grad={backward}) for _ in range(3))
torch.nn.functional.scaled_dot_product_attention(q, k, v).sum().item()
def new_mod(score, b, h, q_idx, kv_idx):
    return 7.5 * torch.tanh(score / 7.5) + 0.01 * (kv_idx - q_idx)
start = time.perf_counter()
out = attention(q, k, v, score_mod=new_mod)
if {backward}: out.sum().backward()
torch.cuda.synchronize()
print(time.perf_counter() - start)
"""
TRITON = {"ours, Triton": """
from flexattn import flex_attention as attention
from flexattn.runtime import launch_gpu
for kernels in (launch_gpu.FORWARD, launch_gpu.BACKWARD):
    kernels.pop("hopper")
"""}
COUNT = """
import torch, flexattn
slope = 0.1
def call(batch, length, slope):
    q = torch.randn(batch, 2, length, 32, device="cuda", dtype=torch.bfloat16,
                    requires_grad={backward})
    bias = torch.randn(length, device="cuda")
    out = flexattn.flex_attention(
        q, q, q, score_mod=lambda s, b, h, i, j: s + slope * (j - i) + bias[j])
    if {backward}: out.sum().backward()
"""
SWEEPS = {
    "100 lengths": "for n in range(100): call(2, 100 + n, 0.1)",
    "100 batches": "for n in range(100): call(1 + n, 100, 0.1)",
    "100 values": "for n in range(100): call(2, 100, 0.1 + 0.01 * n)",
}


def first_call(options: argparse.Namespace) -> Iterator[Row]:
    """A new mod's first call: with empty caches, and with the disk cache of an earlier process; on
    Hopper with the Triton kernels, too."""
    for backward in (False, True):
        shape = "B1 H8 S512 D64" + (" fwd+bwd" if backward else "")
        for provider, attention in (ATTENTIONS | TRITON).items():
            if options.providers and provider not in options.providers:
                continue
            script = FIRST_CALL.format(attention=attention, backward=backward)
            with tempfile.TemporaryDirectory() as cache:
                for state, runs in (("cold", 1), ("warm disk", 3)):
                    seconds = min(float(fresh_process(script, Path(cache))) for _ in range(runs))
                    yield Row(f"first call, {state}", shape, "bfloat16", provider, seconds * 1e3)


def overhead(options: argparse.Namespace) -> Iterator[Row]:
    """Host time of a call with a ten-op mod and a block mask whose kernel is over before."""
    mod = partial(ten_op_mod, torch.rand(2, device="cuda"))
    for grad in (False, True):
        q, k, v = (torch.randn(1, 2, 128, 64, device="cuda", dtype=torch.bfloat16,
                               requires_grad=grad) for _ in range(3))
        runs: dict[str, Callable[[], object]] = {}
        attention: Any
        make: Any
        for name, attention, make in (
                ("ours", flexattn.flex_attention, flexattn.create_block_mask),
                ("torch_flex", torch.compile(torch_flex.flex_attention, dynamic=False),
                 torch_flex.create_block_mask)):
            if options.providers and name not in options.providers:
                continue
            mask = make(lambda b, h, q_idx, kv_idx: q_idx >= kv_idx, None, None, 128, 128,
                        device="cuda")
            runs[name] = partial(attention, q, k, v, score_mod=mod, block_mask=mask)
        runs["sdpa"] = partial(torch.nn.functional.scaled_dot_product_attention, q, k, v,
                               is_causal=True)
        times = _host_times(runs, options.rounds)
        for name, t in times.items():
            yield Row("ten-op mod, causal" + (", with grad" if grad else ""), "B1 H2 S128 D64",
                      "bfloat16", name, t.median * 1e6, "us", t.spread,
                      ours_is_faster=None if name == "ours" else t.slower_than(times["ours"]))


def _host_times(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, Times]:
    """Interleaved rounds of calls that nothing waits for."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 2):
        for name, run in runs.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(_CALLS):
                run()
            seconds = (time.perf_counter() - start) / _CALLS
            if number >= 2:
                found[name].append(seconds)
    return {name: Times(tuple(times)) for name, times in found.items()}


def compiles(options: argparse.Namespace) -> Iterator[Row]:
    """GPU binaries that 100 calls leave in an empty disk cache."""
    runs = [(case, backward) for case in SWEEPS for backward in (False, True)]
    with ThreadPoolExecutor() as pool:
        for (case, backward), count in zip(runs, pool.map(_compiled, *zip(*runs, strict=True)),
                                           strict=True):
            yield Row(case, "fwd+bwd" if backward else "fwd", "bfloat16", "ours", count,
                      "compiled")


def _compiled(case: str, backward: bool) -> int:
    with tempfile.TemporaryDirectory() as cache:
        fresh_process(COUNT.format(backward=backward) + SWEEPS[case], Path(cache))
        return sum(1 for _ in Path(cache, "flexattn").rglob("*.gpu"))
