"""The fastest of the kernels and tiles that serve a call, found by timing them on the GPU at hand.

In: what the choice depends on, the prepared candidates, and how to run one. Out: the candidate of
the least median time. It is kept on disk with the compiled kernels, so that another process, or
another length of the same magnitude, does not time again.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch

from flexattn import compile
from flexattn.runtime.call import Call
from flexattn.runtime.gpu_launch import Tiled

_WARM, _TIMED = 2, 5  # runs of a candidate
_SUFFIX = ".tuned"
Candidate = tuple[str, Any]  # a kernel's name, and a Prepared or PreparedBackward of it


def asked(call: Call) -> bool:
    """Whether the call asks for it, and can be waited for: a CUDA graph's capture cannot."""
    return bool(call.options.get("autotune")) and not (
        call.query.is_cuda and torch.cuda.is_current_stream_capturing())


def facts_of(call: Call, kernels: Iterable[str]) -> tuple:
    """What the choice depends on: shapes, lengths to the next power of two, and the mods."""
    q, k, v = call.query, call.key, call.value
    mods = [None if mod is None else (str(mod.graph), *(t.requires_grad for t in mod.captures))
            for mod in (call.score, call.mask)]
    sizes = (q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2])
    return (*kernels, torch.cuda.get_device_name(q.device) if q.is_cuda else "",
            *map(_magnitude, sizes), q.shape[3], v.shape[3], q.dtype, *mods,
            call.block_mask is not None, call.want_lse, sorted(map(str, call.options.items())),
            torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision(),
            compile.generators())


def _magnitude(n: int) -> int:
    return max(n - 1, 0).bit_length()


def fastest(facts: tuple, candidates: Callable[[], Iterator[Candidate]],
            run: Callable[[Any], object], seconds: Callable[..., float] | None = None
            ) -> Candidate | None:
    """The candidate that is known to be fastest, or is found to be; None where there is none.
    seconds: times a run."""
    file = hashlib.sha256(repr(facts).encode()).hexdigest()
    known = compile.read(file, _SUFFIX)
    if known is not None:
        for found in candidates():
            if label(*found) == known.decode():
                return found
    measure = seconds or gpu_seconds
    timed = [(measure(partial(run, found[1])), found) for found in candidates()]
    if not timed:
        return None
    best = min(timed, key=lambda item: item[0])[1]
    compile.write(file, _SUFFIX, label(*best).encode())
    return best


def label(name: str, prepared: Tiled) -> str:
    return " ".join([name, *(f"{part}={size}" for part, size in prepared.tile.items())])


def gpu_seconds(run: Callable[[], object]) -> float:
    """The median of a few runs after a warm-up, by the GPU's clock."""
    for _ in range(_WARM):
        run()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(_TIMED)]
    for start, end in pairs:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs) * 1e-3
