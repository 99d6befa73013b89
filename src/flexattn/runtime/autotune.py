"""The fastest of the kernels and tiles that serve a call, found by timing them on the GPU at hand.

In: what the choice depends on, the prepared candidates, and how to run one. Out: the candidate of
the least median time. Its label is remembered, and kept on disk with the compiled kernels, so that
another process, or another length of the same magnitude, does not time again.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flexattn import compile
from flexattn.compile_triton import triton_version
from flexattn.runtime.call import Call
from flexattn.runtime.gpu_launch import Tiled
from flexattn.runtime.launch_triton_decode import decodes
from flexattn.runtime.tensor_map import takes
from flexattn.runtime.triton_backward_plan import deterministic

_WARM, _TIMED = 2, 5  # runs of a candidate
_SUFFIX = ".tuned"
Candidate = tuple[str, Any]  # a kernel's name, and a Prepared or PreparedBackward of it


def asked(call: Call) -> bool:
    """Whether the call asks for it. Not if it is to be deterministic: another run may find another
    tile fastest, which rounds sums otherwise."""
    return bool(call.options.get("autotune")) and not deterministic(call)


def postponed(call: Call) -> bool:
    """Whether the call asks for it when nothing can be timed: while a CUDA graph is captured."""
    return asked(call) and call.query.is_cuda and torch.cuda.is_current_stream_capturing()


def facts_of(call: Call, kernels: Iterable[str], *more: Any) -> tuple:
    """What the choice depends on: shapes, lengths to the next power of two, the mods, and whatever
    decides which kernels are candidates. more: what a backward is given besides."""
    q, k, v, mask = call.query, call.key, call.value, call.block_mask
    mods = [None if mod is None else (str(mod.graph), *(t.requires_grad for t in mod.captures))
            for mod in (call.score, call.mask)]
    sizes = (q.shape[0], k.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2])
    tensors = (q, k, v, *(t for t in more if isinstance(t, Tensor)))
    return (*kernels, torch.cuda.get_device_name(q.device) if q.is_cuda else "",
            *map(magnitude, sizes), q.shape[3], v.shape[3], q.dtype, *map(takes, tensors), *mods,
            None if mask is None else (mask.BLOCK_SIZE, mask.table.runs is None), decodes(call),
            call.want_lse, call.want_max_scores, sorted(map(str, call.options.items())),
            torch.get_float32_matmul_precision(), triton_version(), compile.generators())


def magnitude(n: int) -> int:
    return max(n - 1, 0).bit_length()


_labels: dict[str, str] = {}


def fastest(facts: tuple, candidates: Callable[[], Iterator[Candidate]],
            run: Callable[[Any], object], seconds: Callable[..., float] | None = None
            ) -> Candidate | None:
    """The candidate that is known to be fastest, or is found to be; None where there is none.
    seconds: times a run."""
    file = hashlib.sha256(repr(facts).encode()).hexdigest()
    known = _labels.get(file) or (compile.read(file, _SUFFIX) or b"").decode()
    if known:
        for found in candidates():
            if label(*found) == known:
                _labels[file] = known
                return found
    measure = seconds or gpu_seconds
    timed = []
    for found in candidates():
        with suppress(torch.cuda.OutOfMemoryError):  # another may need less
            timed.append((measure(partial(run, found[1])), found))
    if not timed:
        return None
    best = min(timed, key=lambda item: item[0])[1]
    _labels[file] = label(*best)
    compile.write(file, _SUFFIX, _labels[file].encode())
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
