"""The GPU suite: `python -m benchmarks.run --suite gpu`, ours and every peer in the same rounds.

In: the options of benchmarks.run; --sections and --cases choose, so that a part fits a short
run. Out: rows, a generator for each section; a rate is that of attended work. Peers that cannot
run a case are named on stderr and left out.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import gpu_accuracy, gpu_cases, gpu_host, gpu_memory, providers
from benchmarks.cases import Attention, Case
from benchmarks.gpu_cases import CASES, GpuCase, HeadShape
from benchmarks.gpu_measure import interleaved
from benchmarks.measure import Times
from benchmarks.report import Row

DEVICE = "cuda"
TOKENS, COLUMNS = 16384, 2048  # batch x length, heads x head_dim of the tables of shapes
MODS = ("noop", "causal", "alibi_causal", "softcap", "table", "sliding", "documents")
DECODE = ((1, 32, 8, 131072, 128), (16, 32, 8, 8192, 128), (64, 32, 8, 4096, 128),
          (8, 16, 16, 16384, 64))  # batch, heads, kv_heads, kv_len, head_dim

HEAVY = {"t5": 4096, "graphormer": 1024, "natten": 4096}  # lengths
ONE_STAGE = ("table", "learned bias", "graphormer edge")  # read a tensor by q_idx and kv_idx
_HALF = torch.bfloat16
CORNERS = {
    "D256": HeadShape(4, 8, 8, 4096, 4096, 256, _HALF),
    "D96": HeadShape(4, 16, 16, 4096, 4096, 96, _HALF),
    "D192/128": HeadShape(2, 16, 16, 4096, 4096, 192, _HALF, value_dim=128),
    "D576/512": HeadShape(1, 16, 1, 4096, 4096, 576, _HALF, value_dim=512),
    "float16": HeadShape(4, 16, 16, 4096, 4096, 128, torch.float16),
    "float32": HeadShape(2, 16, 16, 4096, 4096, 64, torch.float32),
    "S512": HeadShape(32, 16, 16, 512, 512, 128, _HALF),
    "S1000": HeadShape(16, 16, 16, 1000, 1000, 128, _HALF),
    "B1H8": HeadShape(1, 8, 8, 4096, 4096, 128, _HALF),
}
SHAPES = [
    HeadShape(2, 16, 16, 8192, 8192, 96, _HALF),
    HeadShape(2, 32, 32, 8192, 8192, 128, _HALF), HeadShape(2, 32, 8, 8192, 8192, 128, _HALF),
    HeadShape(2, 32, 32, 8192, 8192, 64, _HALF), HeadShape(2, 32, 8, 8192, 8192, 64, _HALF),
    *(HeadShape(4, 16, 16, length, length, 128, _HALF) for length in (4000, 4033, 4096)),
    HeadShape(2, 8, 8, 8192, 8192, 256, _HALF),
    HeadShape(2, 16, 16, 8192, 8192, 192, _HALF, value_dim=128),
]

Makers = dict[str, Callable[[], Callable[[], object]]]


def _backend(case: Case, backward: bool, which: SDPBackend) -> Attention | None:
    if not (isinstance(case, GpuCase) and case.kernels):
        return None

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(which):
            return case.sdpa(q, k, v)
    return run


def _written_out(case: Case, backward: bool) -> Attention | None:
    """What SDPA's users write: a mask tensor, or eager attention."""
    own = isinstance(case, GpuCase) and not case.kernels and case.peer
    return case.sdpa if own else None


def _one_stage(case: Case, backward: bool) -> Attention | None:
    """torch's flex where its own choice does not fit the GPU, as its users get it to run."""
    if case.name not in ONE_STAGE:
        return None
    return providers.torch_flex_compiled(case, backward, kernel_options={"num_stages": 1})


PROVIDERS: dict[str, providers.Provider] = {
    "ours": providers.ours,
    "torch_flex": providers.torch_flex_compiled,
    "torch_flex, 1 stage": _one_stage,
    "cudnn": partial(_backend, which=SDPBackend.CUDNN_ATTENTION),
    "flash2": partial(_backend, which=SDPBackend.FLASH_ATTENTION),
    "written_out": _written_out,
}


def mods(options: argparse.Namespace, head_dim: int) -> Iterator[Row]:
    """B=2, S=8192 of every mod, forward and backward; and how fast this GPU multiplies."""
    yield from _product(options)
    shape = HeadShape(2, COLUMNS // head_dim, COLUMNS // head_dim, 8192, 8192, head_dim,
                      torch.bfloat16)
    for name in options.cases or MODS:
        yield from both_ways(CASES[name](shape), options)


def _product(options: argparse.Namespace) -> Iterator[Row]:
    """Of two square matrices of bfloat16, by cuBLAS."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = interleaved({"cublas": lambda: a @ b}, rounds=options.rounds)
    yield from _rows("matmul", "8192 x 8192 x 8192", times, 2 * 8192**3 * 1e-12, "TFLOP/s")


def plain(options: argparse.Namespace) -> Iterator[Row]:
    """Twelve rows without a mod, against the libraries' kernels."""
    for head_dim in options.head_dims:
        for length in (2048, 8192, 16384):
            heads = COLUMNS // head_dim
            shape = HeadShape(TOKENS // length, heads, heads, length, length, head_dim,
                              torch.bfloat16)
            for make in (gpu_cases.noop, gpu_cases.causal):
                yield from both_ways(make(shape), options, ("ours", "cudnn", "flash2"))


def decode(options: argparse.Namespace) -> Iterator[Row]:
    """One query against a long cache. The rate counts the bytes of key and value once. Softcap has
    its own row of ours, and the peers of plain attention beside it."""
    for batch, heads, kv_heads, length, head_dim in DECODE:
        shape = HeadShape(batch, heads, kv_heads, 1, length, head_dim, torch.bfloat16)
        yield from _compare(gpu_cases.noop(shape), options, PROVIDERS, backward=False, read=True)
        yield from _compare(gpu_cases.softcap(shape), options, ("ours", "torch_flex"),
                            backward=False, read=True)


def corners(options: argparse.Namespace) -> Iterator[Row]:
    """Head dims, dtypes and lengths off the beaten track, all causal."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    for name in options.corners or CORNERS:
        yield from both_ways(gpu_cases.causal(CORNERS[name]), options,
                             ("ours", "torch_flex", "cudnn", "flash2"))
    torch.set_float32_matmul_precision(before)


def shapes(options: argparse.Namespace) -> Iterator[Row]:
    """Heads of 96 columns; grouped heads beside full ones; lengths beside the next multiple of a
    tile; heads of 256 columns and of 192 with values of 128. Forward."""
    peers = ("ours", "torch_flex", "cudnn", "flash2")
    for make in (gpu_cases.noop, gpu_cases.causal):
        for shape in SHAPES:
            yield from _compare(make(shape), options, peers, backward=False)


def heavy(options: argparse.Namespace) -> Iterator[Row]:
    """The heaviest mods and masks of the library."""
    for name in options.cases or HEAVY:
        length = HEAVY[name]
        shape = HeadShape(4, 16, 16, length, length, 64, torch.bfloat16)
        yield from both_ways(CASES[name](shape), options,
                             ("ours", "torch_flex", "torch_flex, 1 stage"))


def learned_bias(options: argparse.Namespace) -> Iterator[Row]:
    """Forward and backward of a trained bias; "deterministic" compares ours with ours."""
    for head_dim in options.head_dims:
        heads = COLUMNS // head_dim
        yield from _learned_bias(HeadShape(2, heads, heads, 8192, 8192, head_dim, torch.bfloat16),
                                 options)


def _learned_bias(shape: HeadShape, options: argparse.Namespace) -> Iterator[Row]:
    case, inputs = gpu_cases.learned_bias(shape), shape.inputs(requires_grad=True)
    d_out = torch.randn_like(inputs[0])

    def steps(provider: str, exact: bool = False) -> Callable[[], object]:
        attention = PROVIDERS[provider](case, True)
        assert attention is not None

        def step() -> None:
            torch.use_deterministic_algorithms(exact, warn_only=True)
            torch.autograd.grad(attention(*inputs), (*inputs, *case.trained), d_out)
            torch.use_deterministic_algorithms(False)
        return step

    makers: Makers = {"ours": partial(steps, "ours"),
                      "deterministic": partial(steps, "ours", True)}
    for peer in ("torch_flex", "torch_flex, 1 stage"):
        if peer in _wanted(options, PROVIDERS):
            makers[peer] = partial(steps, peer)
    times = interleaved(_ready(case.name, makers), rounds=options.rounds)
    work = case.flops(False) + case.flops(True)
    yield from _rows("learned bias fwd+bwd", shape, times, work * 1e-12, "TFLOP/s")


SECTIONS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "mods128": partial(mods, head_dim=128),
    "mods64": partial(mods, head_dim=64),
    "plain": plain,
    "decode": decode,
    "corners": corners,
    "shapes": shapes,
    "accuracy": gpu_accuracy.accuracy,
    "heavy": heavy,
    "learned_bias": learned_bias,
    "host": gpu_host.overhead,
    "first_call": gpu_host.first_call,
    "compiles": gpu_host.compiles,
    "memory": gpu_memory.peak,
}


PARTS = {  # what chooses a part of a section
    "mods128": ("--cases", MODS), "mods64": ("--cases", MODS), "heavy": ("--cases", tuple(HEAVY)),
    "corners": ("--corners", tuple(CORNERS)), "learned_bias": ("--head-dims", ("64", "128")),
    "plain": ("--head-dims", ("64", "128")),
}


def both_ways(case: GpuCase, options: argparse.Namespace,
              peers: Sequence[str] = tuple(PROVIDERS)) -> Iterator[Row]:
    for backward in (False, True):
        yield from _compare(case, options, peers, backward=backward)


def _wanted(options: argparse.Namespace, peers: Sequence[str] | dict) -> list[str]:
    return [name for name in peers if not options.providers or name in options.providers]


def _compare(case: GpuCase, options: argparse.Namespace, peers: Sequence[str] | dict, *,
             backward: bool, read: bool = False) -> Iterator[Row]:
    inputs = case.shape.inputs(requires_grad=backward)
    made = {name: PROVIDERS[name](case, backward) for name in _wanted(options, peers)}
    makers: Makers = {name: partial(_run_of, attention, inputs, case, backward)
                      for name, attention in made.items() if attention is not None}
    times = interleaved(_ready(case.name, makers), rounds=options.rounds)
    direction = "" if read else " bwd" if backward else " fwd"
    work, unit = (sum(t.nbytes for t in inputs[1:]) * 1e-9, "GB/s") if read else (
        case.flops(backward) * 1e-12, "TFLOP/s")
    yield from _rows(case.name + direction, case.shape, times, work, unit)
    del makers, made, inputs
    gc.collect()
    torch.cuda.empty_cache()


def _rows(name: str, shape: object, times: dict[str, Times], work: float,
          unit: str) -> Iterator[Row]:
    dtype = str(getattr(shape, "dtype", "")).removeprefix("torch.")
    for provider, t in times.items():
        yield Row(name, str(shape), dtype, provider, t.median * 1e3, spread=t.spread,
                  rate=work / t.median, rate_unit=unit,
                  ours_is_faster=t.slower_than(times["ours"])
                  if provider != "ours" and "ours" in times else None)


def _run_of(attention: Attention, inputs: tuple[Tensor, ...], case: Case,
            backward: bool) -> Callable[[], object]:
    """The timed function; for a backward, of a forward done once."""
    if not backward:
        return partial(_without_grad, attention, inputs)
    out = attention(*inputs)
    wanted, d_out = (*inputs, *case.trained), torch.randn_like(out)
    return lambda: torch.autograd.grad(out, wanted, d_out, retain_graph=True)


def _without_grad(attention: Attention, inputs: tuple[Tensor, ...]) -> Tensor:
    with torch.no_grad():
        return attention(*inputs)


def _ready(case: str, makers: Makers) -> dict[str, Callable[[], object]]:
    """The functions to be timed, each called once here, so that one that fails is left out."""
    found: dict[str, Callable[[], object]] = {}
    for name, make in makers.items():
        try:
            run = make()
            run()
        except Exception as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            print(f"  {name} cannot run {case}: {first[:250]}", file=sys.stderr)
            gc.collect()
            torch.cuda.empty_cache()
        else:
            found[name] = run
    return found
