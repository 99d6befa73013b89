"""Compilation and its caches: cold, warm, shared by processes, private, damaged, not writable."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest
import torch

from flexattn import compile

IR = """
define void @answer(ptr %p) {{
  store i64 {value}, ptr %p
  ret void
}}
"""


def call(library):
    result = ctypes.c_int64()
    library.function("answer", ctypes.c_void_p)(ctypes.addressof(result))
    return result.value


def refuse():
    raise AssertionError("must come from a cache")


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """A cache directory that does not exist yet, and an empty memory cache."""
    monkeypatch.setenv("FLEXATTN_CACHE_DIR", str(tmp_path / "new" / "cache"))
    monkeypatch.setattr(compile, "_libraries", {})
    compile.cache_directory.cache_clear()
    yield tmp_path / "new" / "cache"
    compile.cache_directory.cache_clear()


def test_memory_then_disk(directory, monkeypatch):
    assert call(compile.library("memory-disk", lambda: IR.format(value=42), ["answer"])) == 42
    assert call(compile.library("memory-disk", refuse, ["answer"])) == 42
    monkeypatch.setattr(compile, "_libraries", {})
    assert call(compile.library("memory-disk", refuse, ["answer"])) == 42
    assert call(compile.library("another", lambda: IR.format(value=43), ["answer"])) == 43


def test_files_are_private(directory):
    compile.library("private", lambda: IR.format(value=1), ["answer"])
    assert directory.stat().st_mode & 0o777 == 0o700
    files = list(directory.iterdir())
    assert [f.suffix for f in files] == [".o"] and files[0].stat().st_mode & 0o777 == 0o600


def test_a_directory_others_can_write_is_not_trusted(directory):
    directory.mkdir(parents=True)
    directory.chmod(0o777)
    compile.library("untrusted", lambda: IR.format(value=1), ["answer"])
    assert not list(directory.iterdir())


@pytest.mark.parametrize("damage", [b"", b"garbage", None], ids=["empty", "garbage", "torn"])
def test_a_damaged_object_is_compiled_anew(directory, monkeypatch, damage):
    compile.library("damaged", lambda: IR.format(value=5), ["answer"])
    file, = directory.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-7] if damage is None else damage)
    monkeypatch.setattr(compile, "_libraries", {})
    assert call(compile.library("damaged", lambda: IR.format(value=6), ["answer"])) == 6
    assert file.read_bytes() != whole and len(file.read_bytes()) >= len(whole)


def test_without_a_writable_place(tmp_path, monkeypatch):
    """A home that cannot be written: everything works, nothing is kept."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLEXATTN_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(compile, "_libraries", {})
    compile.cache_directory.cache_clear()
    assert compile.cache_directory() is None
    assert call(compile.library("nowhere", lambda: IR.format(value=8), ["answer"])) == 8
    compile.cache_directory.cache_clear()


def test_key_holds_host_and_generators(monkeypatch):
    before = compile._digest("k")
    assert before != compile._digest("l")
    monkeypatch.setattr(compile, "generators", lambda: "another version")
    assert compile._digest("k") != before
    monkeypatch.undo()
    other = compile.Host("x86_64-unknown-linux-gnu", "another", "")
    monkeypatch.setattr(compile, "host", lambda: other)
    assert compile._digest("k") != before


@pytest.mark.parametrize("features, bits", [
    ("+avx512f,+avx512vl,+avx512bw,+avx512dq,+avx2,+fma", 512), ("+avx512f,+avx2,+fma", 256),
    ("+avx2,-fma", 128), ("+neon", 128)])
def test_vector_width(features, bits):
    assert compile.Host("", "", features).vector_bits == bits


def test_vectors_are_no_wider_than_torchs(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    limited = compile.host.__wrapped__()
    assert "+avx512" not in limited.features and limited.vector_bits <= 256


def test_wrong_ir_is_refused(directory):
    with pytest.raises(RuntimeError):
        compile.library("wrong", lambda: "define void @f() { ret i64 }", ["f"])


COLD = """
import torch
from flexattn.runtime.call import Call
from flexattn.runtime.launch_cpu import forward
torch.manual_seed(1)
q, k, v = torch.randn(3, 1, 2, 40, 16)
expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
assert torch.allclose(forward(Call(q, k, v, 0.25)).out, expected, atol=1e-5)
"""


def test_several_processes_starting_cold(tmp_path):
    environment = {**os.environ, "FLEXATTN_CACHE_DIR": str(tmp_path / "cache"),
                   "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen([sys.executable, "-c", COLD], env=environment) for _ in range(2)]
    assert [p.wait(120) for p in started] == [0, 0]
    assert [f.suffix for f in (tmp_path / "cache").iterdir()] == [".o"]


def test_pairs_of_bfloat16_where_they_are_faster():
    features = "+avx512f,+avx512vl,+avx512bw,+avx512dq,+avx512bf16"
    assert compile.Host("x86_64-linux-gnu", "znver4", features).pairs
    assert not compile.Host("x86_64-linux-gnu", "emeraldrapids", features).pairs
    assert not compile.Host("x86_64-linux-gnu", "znver4", features[:-12]).pairs
