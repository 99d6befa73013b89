"""What a call costs besides its arithmetic: first calls in fresh processes, host time of a tiny
call, and how often 100 lengths or 100 captured values compile.

Out: rows; `value` is milliseconds, microseconds or a count, as `unit` says.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex

import flexattn
from benchmarks.measure import interleaved
from benchmarks.report import ROOT, Row

FIRST_CALL = """
import time, torch
torch.set_num_threads({threads})
{attention}
q, k, v = (torch.randn(1, 8, 512, 64, requires_grad={backward}) for _ in range(3))
torch.nn.functional.scaled_dot_product_attention(q, k, v).sum()
def new_mod(score, b, h, q_idx, kv_idx):
    return 7.5 * torch.tanh(score / 7.5) + 0.01 * (kv_idx - q_idx)
start = time.perf_counter()
out = attention(q, k, v, score_mod=new_mod)
if {backward}: out.sum().backward()
print(time.perf_counter() - start)
"""
ATTENTIONS = {
    "ours": "from flexattn import flex_attention as attention",
    "torch_flex": "from torch.nn.attention.flex_attention import flex_attention\n"
                  "attention = torch.compile(flex_attention)",
}
COUNT_LENGTHS = """
import torch, flexattn
for length in range(64, 164):
    q = torch.randn(1, 2, length, 32, requires_grad={backward})
    out = flexattn.flex_attention(q, q, q, score_mod=lambda s, b, h, i, j: s + 0.1 * (j - i))
    if {backward}: out.sum().backward()
"""
COUNT_VALUES = """
import torch, flexattn
q = torch.randn(1, 2, 64, 32, requires_grad={backward})
for step in range(100):
    slope = 0.1 + 0.01 * step
    out = flexattn.flex_attention(q, q, q, score_mod=lambda s, b, h, i, j: s + slope * (j - i))
    if {backward}: out.sum().backward()
"""


def fresh_process(script: str, cache: Path) -> str:
    """What the script prints, run in a new interpreter whose disk caches live in `cache`."""
    env = os.environ | {"FLEXATTN_CACHE_DIR": str(cache / "flexattn"),
                        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
                        "TRITON_CACHE_DIR": str(cache / "triton"),
                        "MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc gives freed tensors back
    done = subprocess.run([sys.executable, "-c", script], env=env, cwd=ROOT, text=True,
                          capture_output=True)
    if done.returncode:
        raise RuntimeError(f"the measured process failed:\n{done.stderr}")
    return done.stdout


def first_call(options: argparse.Namespace) -> Iterator[Row]:
    """A new mod's first call: with empty caches, and with the disk cache of an earlier process."""
    for backward in (False, True):
        shape = "B1 H8 S512 D64" + (" fwd+bwd" if backward else "")
        for provider, attention in ATTENTIONS.items():
            if provider not in options.providers or (backward and provider != "ours"):
                continue
            script = FIRST_CALL.format(threads=options.threads, attention=attention,
                                       backward=backward)
            with tempfile.TemporaryDirectory() as cache:
                for state, runs in (("cold", 1), ("warm disk", 3)):
                    seconds = min(float(fresh_process(script, Path(cache))) for _ in range(runs))
                    yield Row(f"first call, {state}", shape, "float32", provider, seconds * 1e3)


def ten_op_mod(slopes: Tensor, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor,
               kv_idx: Tensor) -> Tensor:
    """Ten operations besides the read of `slopes`."""
    distance = (q_idx - kv_idx).abs()
    capped = 30.0 * torch.tanh(score / 30.0)
    return torch.where(distance < 12, capped - slopes[h] * distance, capped * 0.5)


def overhead(options: argparse.Namespace) -> Iterator[Row]:
    """The whole time of a call whose arithmetic is next to nothing."""
    q, k, v = (torch.randn(1, 1, 16, 16) for _ in range(3))
    mod = partial(ten_op_mod, torch.rand(1))
    runs = {"ours": lambda: flexattn.flex_attention(q, k, v, score_mod=mod)}
    if "torch_flex" in options.providers:
        compiled = torch.compile(torch_flex.flex_attention, dynamic=False)
        runs["torch_flex"] = lambda: compiled(q, k, v, score_mod=mod)
    with torch.no_grad():
        times = interleaved(runs, rounds=options.rounds)
    for name, t in times.items():
        yield Row("ten-op mod", "B1 H1 S16 D16", "float32", name, t.median * 1e6, "us", t.spread,
                  ours_is_faster=None if name == "ours" else t.slower_than(times["ours"]))


def compiles(options: argparse.Namespace) -> Iterator[Row]:
    """Objects that 100 calls leave in an empty disk cache."""
    for case, script in (("100 lengths", COUNT_LENGTHS), ("100 values", COUNT_VALUES)):
        for backward in (False, True):
            with tempfile.TemporaryDirectory() as cache:
                fresh_process(script.format(backward=backward), Path(cache))
                count = sum(path.is_file() for path in Path(cache, "flexattn").rglob("*"))
            yield Row(case, "fwd+bwd" if backward else "fwd", "float32", "ours", count, "compiled")
