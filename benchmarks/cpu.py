"""The CPU suite: speed of forward, backward and decoding against torch's.

In: the options of benchmarks.run. Out: rows, a generator for each section.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks import host, memory
from benchmarks.cases import CASES, Attention, Case, Shape
from benchmarks.measure import Times, interleaved
from benchmarks.providers import PROVIDERS
from benchmarks.report import Row

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def forward(options: argparse.Namespace) -> Iterator[Row]:
    for shape in _shapes(options):
        for name in options.cases:
            yield from _compare(CASES[name](shape), options, backward=False)


def backward(options: argparse.Namespace) -> Iterator[Row]:
    lengths = sorted({256, *options.lengths})
    for shape in _shapes(options, lengths):
        for name in options.cases:
            yield from _compare(CASES[name](shape), options, backward=True)


def decode(options: argparse.Namespace) -> Iterator[Row]:
    """One query against a long cache. The rate counts the bytes of key and value once."""
    for dtype in options.dtypes:
        for kv_heads in (8, 2):
            for length in (2048, 8192, 32768):
                shape = Shape(1, 8, kv_heads, 1, length, 128, DTYPES[dtype])
                case = CASES["full"](shape)
                yield from _compare(case, options, backward=False, bytes_read=True)


def scaling(options: argparse.Namespace) -> Iterator[Row]:
    """Full and causal attention on 1, 2, 4, ... threads, in few rounds: one thread is slow."""
    before = torch.get_num_threads()
    options = argparse.Namespace(**vars(options) | {"rounds": min(options.rounds, 3)})
    for threads in (2**i for i in range((os.cpu_count() or 1).bit_length())):
        torch.set_num_threads(threads)
        for shape in _shapes(options):
            for name in ("full", "causal"):
                for backward in (False, True):
                    for row in _compare(CASES[name](shape), options, backward=backward):
                        direction = "bwd" if backward else "fwd"
                        yield replace(row, case=f"{name} {direction}, {threads} threads")
    torch.set_num_threads(before)


SECTIONS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "forward": forward,
    "backward": backward,
    "decode": decode,
    "scaling": scaling,
    "first_call": host.first_call,
    "host": host.overhead,
    "compiles": host.compiles,
    "memory": memory.peak,
}


def _shapes(options: argparse.Namespace, lengths: Sequence[int] = ()) -> Iterator[Shape]:
    for dtype in options.dtypes:
        for dim in options.head_dims:
            for length in lengths or options.lengths:
                yield Shape(1, 8, 8, length, length, dim, DTYPES[dtype])


def _compare(case: Case, options: argparse.Namespace, *, backward: bool,
             bytes_read: bool = False) -> Iterator[Row]:
    shape = case.shape
    inputs = shape.inputs(requires_grad=backward)
    runs = dict(_ready(case, inputs, options.providers, backward))
    times = interleaved(runs, rounds=options.rounds, device=shape.device)
    for name, t in times.items():
        work = (2 * inputs[1].numel() * shape.dtype.itemsize if bytes_read
                else case.flops(backward))
        yield Row(case.name, str(shape), str(shape.dtype).removeprefix("torch."), name,
                  t.median * 1e3, spread=t.spread, rate=work / t.median * 1e-9,
                  rate_unit="GB/s" if bytes_read else "GFLOP/s",
                  ours_is_faster=_against_ours(name, times))


def _against_ours(name: str, times: dict[str, Times]) -> float | None:
    return times[name].slower_than(times["ours"]) if name != "ours" and "ours" in times else None


def _ready(case: Case, inputs: tuple[Tensor, Tensor, Tensor], providers: Sequence[str],
           backward: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every provider that can run the case, as a function without arguments; called once here, so
    that one that fails is named and left out."""
    for name in providers:
        attention = PROVIDERS[name](case, backward)
        if attention is None:
            continue
        try:
            run = _backward_of(attention, inputs, case) if backward else _no_grad(attention, inputs)
            run()
        except Exception as error:
            print(f"  {name} cannot run {case.name}: {str(error).splitlines()[0][:100]}",
                  file=sys.stderr)
        else:
            yield name, run


def _no_grad(attention: Attention,
             inputs: tuple[Tensor, Tensor, Tensor]) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return attention(*inputs)
    return run


def _backward_of(attention: Attention, inputs: tuple[Tensor, Tensor, Tensor],
                 case: Case) -> Callable[[], object]:
    """The backward pass alone, of a forward done once."""
    out = attention(*inputs)
    d_out = torch.randn_like(out)
    wanted = (*inputs, *case.trained)
    return lambda: torch.autograd.grad(out, wanted, d_out, retain_graph=True)
