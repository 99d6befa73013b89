"""The block_mask suite: what making a block mask costs, in time and memory, and what is proved.

In: the options of benchmarks.run; `--device` says where the masks lie. Out: rows, a generator for
each section. torch's compiled create_block_mask, quadratic in the length and slow to compile, is
measured for one case on an accelerator.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks.host import fresh_process
from benchmarks.measure import Times, interleaved
from benchmarks.report import Row
from flexattn import create_block_mask, masks
from flexattn.masks import and_masks, causal

BLOCK = 128
DOCUMENTS = 1000
LENGTHS = (1 << 16, 1 << 17, 1 << 18, 1 << 19, 1 << 20)
AGAINST_TORCH = ("1000 documents", 1 << 18)
GALLERY = Path(__file__).parents[1] / "docs" / "gallery_entries.py"
Make = Callable[[int, str], Any]


def documents(length: int, device: str) -> Any:
    """1,000 documents of random lengths, the same for every run."""
    cuts = sorted(random.Random(DOCUMENTS).sample(range(1, length), DOCUMENTS - 1))
    lengths = [end - start for start, end in zip([0, *cuts], [*cuts, length], strict=True)]
    return masks.causal_document(masks.lengths_to_ids(lengths).to(device))


CASES: dict[str, Make] = {
    "causal": lambda length, device: causal,
    "window 4096": lambda length, device: and_masks(causal, masks.sliding_window(4096)),
    "prefix_lm": lambda length, device: masks.prefix_lm(length // 10),
    "1000 documents": documents,
}
WHOLE = {"natten 1024x1024": lambda length, device: masks.natten((1024, 1024), (13, 13))}


def time(options: argparse.Namespace) -> Iterator[Row]:
    """Milliseconds, and bytes held, as a rate in KiB."""
    for name, make in (CASES | WHOLE).items():
        for length in LENGTHS if name in CASES else LENGTHS[-1:]:
            mask_mod = make(length, options.device)
            runs: dict[str, Callable[[], object]] = {
                "ours": lambda n=length, f=mask_mod: create_block_mask(  # type: ignore[misc]
                    f, None, None, n, n, options.device, BLOCK)}
            if options.device != "cpu" and (name, length) == AGAINST_TORCH:
                runs["torch_compiled"] = _torch(mask_mod, length, options.device)
            for _ in range(2):  # a GPU's kernel serves from the second mask of a form on
                runs["ours"]()
            times = interleaved(runs, rounds=options.rounds, device=options.device)
            yield from _rows(name, length, runs, times)


def _torch(mask_mod: Any, length: int, device: str) -> Callable[[], object]:
    from torch.nn.attention.flex_attention import create_block_mask as theirs

    compiled = torch.compile(theirs)
    return lambda: compiled(mask_mod, None, None, length, length, device, BLOCK)


def _rows(name: str, length: int, runs: dict[str, Callable[[], object]],
          times: dict[str, Times]) -> Iterator[Row]:
    for provider, t in times.items():
        slower = None if provider == "ours" else t.slower_than(times["ours"])
        yield Row(name, f"S{length}", "", provider, t.median * 1e3, spread=t.spread,
                  rate=_bytes(runs[provider]()) / 1024, rate_unit="KiB held",
                  ours_is_faster=slower)


def _bytes(mask: Any) -> int:
    if hasattr(mask, "nbytes"):
        return mask.nbytes
    leaves = [getattr(mask, name) for name in mask._TENSOR_ATTRS]
    return sum(t.numel() * t.element_size() for t in leaves if t is not None)


def columns(options: argparse.Namespace) -> Iterator[Row]:
    """The table by key columns, that backward kernels read."""
    for name, make in CASES.items():
        mask = create_block_mask(make(LENGTHS[-1], options.device), None, None, LENGTHS[-1],
                                 LENGTHS[-1], options.device, BLOCK)

        def again(mask: Any = mask) -> object:
            return mask.to(options.device).columns()

        times = interleaved({"ours": again}, rounds=options.rounds, device=options.device)["ours"]
        yield Row(name, f"S{LENGTHS[-1]}", "", "ours", times.median * 1e3, spread=times.spread)


FRESH = """
import time, torch, flexattn
from benchmarks import block_mask
torch.set_num_threads({threads})

def status(key):
    line = next(s for s in open("/proc/self/status") if s.startswith(key))
    return int(line.split()[1]) * 1024

mask_mod = (block_mask.CASES | block_mask.WHOLE)["{case}"](1 << 20, "cpu")
open("/proc/self/clear_refs", "w").write("5")
before, start = status("VmRSS"), time.perf_counter()
mask = flexattn.create_block_mask(mask_mod, None, None, 1 << 20, 1 << 20)
print(time.perf_counter() - start, status("VmHWM") - before)
"""


def fresh(options: argparse.Namespace) -> Iterator[Row]:
    """The first call of a process: seconds, and the peak of its memory (CPU, Linux)."""
    for name in CASES | WHOLE:
        with tempfile.TemporaryDirectory() as cache:
            said = fresh_process(FRESH.format(threads=options.threads, case=name), Path(cache))
        seconds, peak = map(float, said.split())
        yield Row(name, f"S{LENGTHS[-1]}", "", "ours", seconds * 1e3, rate=peak / 2**20,
                  rate_unit="MiB peak")


def evaluated(options: argparse.Namespace) -> Iterator[Row]:
    """Share of the blocks that are not empty whose elements had to be evaluated, in percent, for
    the large pictures of the gallery."""
    entries = _gallery()
    names = {"torch": torch, **vars(masks)}
    packed = "lengths_to_ids([9000, 1500, 4000, 12000, 6268])"
    for entry in (e for theme in entries.MASKS.values() for e in theme):
        mask_mod = eval(entry.large.replace("PACKED", packed), dict(names))
        heads = 2 if entry.name == "per_head" else None
        q_len, kv_len = entry.large_size
        found = create_block_mask(mask_mod, None, heads, q_len, kv_len,
                                  BLOCK_SIZE=entry.block).explain()
        size = f"{q_len}x{kv_len}"
        yield Row(entry.name, f"S{size} block {entry.block}", "", "ours",
                  100 * found.evaluated_share, "%", rate=found.blocks, rate_unit="blocks")


def _gallery() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gallery_entries", GALLERY)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


SECTIONS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "time": time,
    "columns": columns,
    "fresh": fresh,
    "evaluated": evaluated,
}
