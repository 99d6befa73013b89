"""LLVM IR text -> machine code for this host, cached in memory and on disk.

In: a key that names what the code is made of, a function that writes the IR (called only when
neither cache has the key) and the names to export. Out: a `Library` of callable addresses. Objects
lie in `FLEXATTN_CACHE_DIR`, or the user's cache directory, one file a key, written under a private
name and renamed, so that processes starting cold at once only repeat work. A directory that cannot
be written turns the disk cache off; a damaged file is compiled anew.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from llvmlite import binding as llvm


@dataclass(frozen=True)
class Host:
    """The processor code is generated for."""

    triple: str
    cpu: str
    features: str

    @property
    def vector_bits(self) -> int:
        """Widest vectors worth using: 512 with AVX-512, 256 with AVX2 and FMA, otherwise 128."""
        return _vector_bits(self.features)

    @property
    def pairs(self) -> bool:
        """Whether products of pairs of bfloat16 are worth using: twice as fast as float32's on
        AMD's Zen 4, a third slower on an Intel Xeon (Emerald Rapids); LLVM must know the type."""
        has = "+avx512bf16" in self.features.split(",") and self.cpu.startswith("znver")
        return has and self.vector_bits == 512 and llvm.llvm_version_info[0] >= 16


@cache
def _vector_bits(features: str) -> int:
    has = set(features.split(","))
    if {"+avx512f", "+avx512vl", "+avx512bw", "+avx512dq"} <= has:
        return 512
    return 256 if {"+avx2", "+fma"} <= has else 128


@cache
def host() -> Host:
    """The processor we run on, limited as torch is (ATEN_CPU_CAPABILITY=avx2)."""
    features = llvm.get_host_cpu_features().flatten()
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        features = features.replace("+avx512", "-avx512")
    return Host(llvm.get_process_triple(), llvm.get_host_cpu_name(), features)


class Library:
    """Compiled functions: `library.address(name)`, `library.function(name, ctypes types...)`."""

    def __init__(self, tracker: Any, keep: Any) -> None:
        self._tracker, self._keep = tracker, keep

    def address(self, name: str) -> int:
        return self._tracker[name]

    def function(self, name: str, *argument_types: Any, result: Any = None) -> Callable[..., Any]:
        """A ctypes function; a call releases the GIL."""
        return ctypes.CFUNCTYPE(result, *argument_types)(self.address(name))


_MAGIC = b"flexattn object 1\n"
_libraries: dict[str, Library] = {}
_lock = Lock()


def library(key: str, build: Callable[[], str], exports: Sequence[str]) -> Library:
    """The compiled module for `key`; `build()` gives its IR where it was not compiled before.

    `key` must say everything the IR depends on; host, LLVM and package version are added here.
    """
    found = _libraries.get(key)
    if found is not None:
        return found
    name = _digest(key)
    code = read(name, ".o")
    fresh = code is None
    if code is None:
        code = compile_object(build())
    with _lock:
        if key not in _libraries:
            _libraries[key] = _link(code, exports)
    if fresh:
        write(name, ".o", code)
    return _libraries[key]


def compile_object(text: str, target: Host | None = None) -> bytes:
    """Object code of a module, for this host unless told."""
    machine = _machine(target or host())
    module = llvm.parse_assembly(text, llvm.create_context())
    module.triple = machine.triple
    module.verify()
    return machine.emit_object(module)


def assembly(text: str, target: Host | None = None) -> str:
    """Assembly of a module, for tests and for reading."""
    machine = _machine(target or host())
    return machine.emit_assembly(llvm.parse_assembly(text, llvm.create_context()))


@cache
def _initialize() -> None:
    if llvm.llvm_version_info[0] < 20:
        llvm.initialize()
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()


def _machine(target: Host) -> llvm.TargetMachine:
    """A new one each time: they are not safe to share between threads."""
    _initialize()
    if target != host():
        llvm.initialize_all_targets()
        llvm.initialize_all_asmprinters()
    return llvm.Target.from_triple(target.triple).create_target_machine(
        cpu=target.cpu, features=target.features, opt=2, jit=True, codemodel="jitdefault")


@cache
def _jit() -> llvm.LLJIT:
    return llvm.create_lljit_compiler(_machine(host()))


_link_names = count()


def _link(code: bytes, exports: Sequence[str]) -> Library:
    builder = llvm.JITLibraryBuilder().add_object_img(code).add_current_process()
    for symbol in exports:
        builder.export_symbol(symbol)
    jit = _jit()
    return Library(builder.link(jit, f"flexattn{next(_link_names)}"), jit)


def _after_fork() -> None:
    """In the child, whatever thread held a lock is gone."""
    global _lock
    _lock = Lock()
    _jit.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# The disk cache


def _digest(key: str) -> str:
    facts = (key, host(), llvm.llvm_version_info, generators())
    return hashlib.sha256(repr(facts).encode()).hexdigest()


@cache
def generators() -> str:
    """Digest of the code that writes the code: stands for the package's version, and changes
    while one edits a kernel, too."""
    digest = hashlib.sha256()
    for room in ("kernels", "lower", "ir"):
        for file in sorted((Path(__file__).parent / room).glob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


@cache
def cache_directory() -> Path | None:
    """Where objects are kept, made private to the user; None where nothing can be written."""
    chosen = os.environ.get("FLEXATTN_CACHE_DIR")
    if chosen:
        place = Path(chosen)
    elif sys.platform == "darwin":
        place = Path.home() / "Library" / "Caches" / "flexattn"
    elif sys.platform == "win32":
        place = Path(os.environ.get("LOCALAPPDATA", str(Path.home()))) / "flexattn" / "cache"
    else:
        place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flexattn"
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = place.stat()
    except (OSError, RuntimeError):
        return None
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & 0o022):
        return None  # another user could put code there
    return place


def read(name: str, suffix: str) -> bytes | None:
    """A cached file, if it is whole: a header with its checksum guards against torn files."""
    place = cache_directory()
    if place is None:
        return None
    try:
        data = (place / f"{name}{suffix}").read_bytes()
    except OSError:
        return None
    head = len(_MAGIC) + 32
    code = data[head:]
    whole = data[:head] == _MAGIC + hashlib.sha256(code).digest()
    return code if whole else None


def write(name: str, suffix: str, code: bytes) -> None:
    """Puts a file into the cache, if there is one."""
    place = cache_directory()
    if place is None:
        return
    with contextlib.suppress(OSError):
        handle, path = tempfile.mkstemp(dir=place, prefix=".new-")  # 0600
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_MAGIC + hashlib.sha256(code).digest() + code)
            os.replace(path, place / f"{name}{suffix}")
        except OSError:
            os.unlink(path)
