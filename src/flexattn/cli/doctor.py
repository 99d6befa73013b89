"""What `flexattn doctor` finds out: versions, devices, kernels, the cache, and a self-check.

In: nothing. Out: a `Report`, plain data.
"""

from __future__ import annotations

import importlib.metadata
import platform
import time
from dataclasses import dataclass

import torch
from torch import Tensor

import flexattn
from flexattn import compile, reference
from flexattn.errors import FlexAttnError
from flexattn.masks import and_masks, causal, sliding_window
from flexattn.mods import softcap

_PACKAGES = ("torch", "triton", "llvmlite", "numpy", "transformers", "matplotlib", "typer")
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class Check:
    """Forward and backward of one dtype on one device against the dense formula in float64."""

    device: str
    dtype: str
    forward: str
    backward: str
    error: float
    seconds: float
    problem: str

    @property
    def passed(self) -> bool:
        return not self.problem


@dataclass(frozen=True)
class Report:
    """versions and machine: name -> text; checks: one for each device and dtype."""

    versions: dict[str, str]
    machine: dict[str, str]
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


def examine() -> Report:
    """Looks, and computes a few small attentions."""
    checks = tuple(_check(device, dtype) for device in _devices() for dtype in _TOLERANCE)
    return Report(_versions(), _machine(), checks)


def _versions() -> dict[str, str]:
    found = {"flexattn": flexattn.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _machine() -> dict[str, str]:
    host, cache = compile.host(), compile.cache_directory()
    facts = {"platform": platform.platform(), "processor": host.cpu,
             "vectors": f"{host.vector_bits} bits", "threads": str(torch.get_num_threads()),
             "kernel cache": str(cache) if cache else "off: no private, writable directory"}
    for i in range(torch.cuda.device_count()):
        facts[f"cuda:{i}"] = torch.cuda.get_device_name(i)
    return facts


def _devices() -> list[str]:
    return ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]


def _check(device: str, dtype: torch.dtype) -> Check:
    names = str(dtype).removeprefix("torch.")
    start = time.perf_counter()
    try:
        error, forward, backward = _compare(device, dtype)
    except (FlexAttnError, RuntimeError) as problem:
        text = str(problem).splitlines()[0]
        return Check(device, names, "", "", float("nan"), time.perf_counter() - start, text)
    wrong = "" if error < _TOLERANCE[dtype] else f"error above {_TOLERANCE[dtype]:.0e}"
    return Check(device, names, forward, backward, error, time.perf_counter() - start, wrong)


def _compare(device: str, dtype: torch.dtype) -> tuple[float, str, str]:
    """The largest relative error of out and gradients, and the names of the kernels."""
    length, mask, mod = 200, and_masks(causal, sliding_window(70)), softcap(5.0)
    query, key, value = tensors = [
        torch.randn(2, heads, length, 64, dtype=dtype, device=device, requires_grad=True)
        for heads in (4, 2, 2)]
    block_mask = flexattn.create_block_mask(mask, None, None, length, length, device=device)
    explanation = flexattn.explain(query, key, value, mod, block_mask, enable_gqa=True)
    kernels = {kernel.role: kernel.file for kernel in explanation.kernels}
    out = flexattn.flex_attention(query, key, value, mod, block_mask, enable_gqa=True)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    wanted = reference.attention(exact[0], exact[1], exact[2], mod, mask)[0]
    d_out = torch.randn_like(out)
    pairs = [(out, wanted), *zip(torch.autograd.grad(out, tensors, d_out),
                                 torch.autograd.grad(wanted, exact, d_out.double()), strict=True)]
    error = max(_distance(got, want) for got, want in pairs)
    return error, kernels.get("forward", ""), kernels.get("backward", "")


def _distance(got: Tensor, wanted: Tensor) -> float:
    return float(((got.double() - wanted).abs().max() / wanted.abs().max()).detach())
