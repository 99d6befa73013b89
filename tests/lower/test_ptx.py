"""What NVIDIA's assembler makes of a negation, for Hopper and Blackwell, without a GPU."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from flexattn.compile_triton import Source, Target, compiled
from flexattn.lower.ptx import assembled_rightly

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
DISASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
TARGETS = {"sm_90": Target("cuda", 90, 32), "sm_100": Target("cuda", 100, 32)}


@triton.jit
def extremes(out, x, y, z, NEGATED: tl.constexpr, LARGEST: tl.constexpr):
    """out = the largest (or least) of x, z and y, or -y."""
    at = tl.program_id(0) * 128 + tl.arange(0, 128)
    a, b, c = tl.load(x + at), tl.load(y + at), tl.load(z + at)
    if NEGATED:
        b = 0 - b
    found = tl.maximum(tl.maximum(a, b), c) if LARGEST else tl.minimum(tl.minimum(a, b), c)
    tl.store(out + at, found)


def instructions(folder, target, kind, **constants):
    """The machine code as text, an item an instruction, without the padding."""
    signature = dict.fromkeys(("out", "x", "y", "z"), f"*{kind}")
    code = compiled(Source(extremes, signature | dict.fromkeys(constants, "constexpr"), constants,
                           options={"num_warps": 4}), TARGETS[target]).code
    file = folder / "kernel.cubin"
    file.write_bytes(code)
    text = subprocess.run([DISASSEMBLER, "-c", file], capture_output=True, check=True, text=True)
    found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+([^;]*);", text.stdout)
    return [line for line in found if not line.startswith("NOP")]


@pytest.mark.skipif(not DISASSEMBLER.exists(), reason="Triton comes without nvdisasm")
@pytest.mark.parametrize("kind", ["i16", "i32"])
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("target", TARGETS)
def test_a_negation_is_not_lost(tmp_path, target, largest, kind):
    """It is an instruction more, whichever way the extremes are computed."""
    negated, plain = (instructions(tmp_path, target, kind, NEGATED=negated, LARGEST=largest)
                      for negated in (True, False))
    assert any("MNMX3" in line for line in plain)
    assert len(negated) > len(plain)


def test_other_negations_stay():
    text = "\tneg.s64 \t%rd2, %rd1;\n\tneg.f32 \t%f2, %f1;\n\tsub.s32 \t%r3, %r2, %r1;\n"
    assert assembled_rightly(text) == text
    assert assembled_rightly("\tneg.s16 \t%rs2, %rs1;\n") == (
        "\tnot.b16 \t%rs2, %rs1;\n\tadd.s16 \t%rs2, %rs2, 1;\n")
