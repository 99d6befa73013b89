"""compute-sanitizer sees no wrong access in a small set of calls.

Its racecheck does not follow what passes between the partitions of a specialised kernel (mbarriers
that TMA completes, bar.arrive): it reports even Triton's own hand-over of a kernel's arguments to
them. So it judges the kernels of one partition, Triton's; repeated runs look for the others' races.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

SMALL_SET = """
import sys, torch, flexattn
from flexattn.runtime import launch_gpu
for kernels in (launch_gpu.FORWARD, launch_gpu.BACKWARD):
    for name in sys.argv[1:]:
        kernels.pop(name, None)
for q_len, kv_len, dim in ((1, 300, 64), (7, 130, 80), (200, 333, 64)):
    q, k, v = (torch.randn(1, heads, n, dim, device="cuda", dtype=torch.bfloat16,
               requires_grad=True) for heads, n in ((4, q_len), (2, kv_len), (2, kv_len)))
    bias = torch.randn(4, q_len + kv_len, device="cuda", requires_grad=True)
    mask = flexattn.create_block_mask(lambda b, h, i, j: (i + kv_len - q_len >= j) & (i % 5 > 0),
                                      None, None, q_len, kv_len, device="cuda")
    out = flexattn.flex_attention(q, k, v, lambda s, b, h, i, j: s + bias[h, i - j + kv_len], mask,
                                  enable_gqa=True)
    out.float().square().sum().backward()
    flexattn.flex_attention(q, k, v, enable_gqa=True)
torch.cuda.synchronize()
print("done")
"""
FOLDERS = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")


@pytest.mark.parametrize(("tool", "left_out"), [("memcheck", []), ("racecheck", ["hopper"])])
def test_small_set(tool, left_out):
    sanitizer = shutil.which("compute-sanitizer", path=os.pathsep.join(
        [os.environ.get("PATH", ""), *FOLDERS]))
    if sanitizer is None:
        pytest.skip("no compute-sanitizer")
    from flexattn import compile

    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
                                "FLEXATTN_CACHE_DIR": str(compile.cache_directory())}
    calls = [sys.executable, "-c", SMALL_SET, *left_out]
    subprocess.run(calls, env=environment, check=True, timeout=200)
    done = subprocess.run([sanitizer, "--tool", tool, "--error-exitcode", "3", *calls],
                          env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0 and "done" in done.stdout, done.stdout[-3000:] + done.stderr[-2000:]
