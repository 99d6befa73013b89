"""Peak extra memory of one long causal call, beyond its inputs and outputs, in a fresh process.

The kernel's high-water mark of resident memory is reset after a short warm-up, so compiled code
and thread pools do not count and whatever the call allocates does. Linux only.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.host import fresh_process
from benchmarks.report import Row

LENGTH = 16384
PEAK = """
import torch, flexattn
torch.set_num_threads({threads})

def status(key):
    line = next(s for s in open("/proc/self/status") if s.startswith(key))
    return int(line.split()[1]) * 1024

def attend(length):
    q, k, v = (torch.randn(1, 8, length, {dim}, requires_grad={backward}) for _ in range(3))
    block_mask = flexattn.create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length)
    d_out = torch.randn_like(q) if {backward} else None
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    out = flexattn.flex_attention(q, k, v, block_mask=block_mask)
    if {backward}: out.backward(d_out)
    outputs = (4 if {backward} else 1) * out.numel() * out.element_size()
    return status("VmHWM") - before - outputs

attend(256)
print(attend({length}))
"""


def peak(options: argparse.Namespace) -> Iterator[Row]:
    """`value` is in MiB; `rate` compares with the bytes of key and value."""
    for dim in options.head_dims:
        for backward in (False, True):
            script = PEAK.format(threads=options.threads, dim=dim, backward=backward,
                                 length=LENGTH)
            with tempfile.TemporaryDirectory() as cache:
                extra = float(fresh_process(script, Path(cache)))
            key_and_value = 2 * 8 * LENGTH * dim * 4
            shape = f"B1 H8 S{LENGTH} D{dim}" + (" fwd+bwd" if backward else "")
            yield Row("causal", shape, "float32", "ours", extra / 2**20, "MiB",
                      rate=extra / key_and_value, rate_unit="of K and V")
