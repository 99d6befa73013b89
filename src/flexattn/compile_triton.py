"""Triton and Gluon kernels -> machine code of one GPU architecture, cached in memory and on disk.

In: a kernel, the types of its arguments and the text of a mod's functions (lower/triton.py). Out:
a `Binary`: code, and how its parameters are packed. Types are given, never inferred from values,
so that a new length is never a new compile. No GPU is needed. Binaries lie beside the CPU's in
compile.cache_directory(); where one is found, Triton is not even imported.
"""

from __future__ import annotations

import builtins
import hashlib
import importlib.metadata
import json
import linecache
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

from flexattn import compile
from flexattn.lower.ptx import assembled_rightly

FUNCTIONS = ("mod_head", "mod_rows", "mod_columns", "mask_mod", "score_mod", "score_mod_grad",
             "grad_offsets", "score_line")


@dataclass(frozen=True)
class Target:
    """A GPU architecture: ("cuda", 90, 32) or ("hip", "gfx942", 64)."""

    backend: str
    arch: int | str
    warp_size: int


@dataclass(frozen=True)
class Source:
    """What to compile. signature: parameter -> type, a tuple of types, or "constexpr"; values of
    the constexprs in `constants`. aligned: paths (parameter, position in its tuple) -> a power of
    two that divides the value. options: num_warps, num_stages, ... as Triton takes them."""

    kernel: Any
    signature: Mapping[str, Any]
    constants: Mapping[str, Any]
    aligned: Mapping[tuple[int, ...], int] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Binary:
    """layout: the struct format of the parameters, those that Triton adds at the end included.
    stages: the text of each stage of compilation, where it was compiled in this process."""

    name: str
    code: bytes
    layout: str
    shared: int
    threads: int
    stages: Mapping[str, str] = field(default_factory=dict, compare=False)


class Mods:
    """The functions of a generated text, as one constexpr of a kernel; None where there is none.
    score_scale and result_scale: see lower/triton.py."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.digest = hashlib.sha256((text + compile.generators()).encode()).hexdigest()[:16]
        name = f"<flexattn mod {self.digest}>"
        linecache.cache[name] = (len(text), None, text.splitlines(True), name)
        functions: dict[str, Any] = {"__name__": f"flexattn.mods_{self.digest}"}
        exec(builtins.compile(text, name, "exec"), functions)
        for function in FUNCTIONS:
            setattr(self, function, functions.get(function))
        self.score_scale = functions.get("SCORE_SCALE", 1.0)
        self.result_scale = functions.get("RESULT_SCALE", 1.0)

    def __repr__(self) -> str:
        """Stands for the functions in Triton's own cache key."""
        return f"Mods({self.digest})"


@cache
def load(text: str) -> Mods:
    """The functions of a generated text; Triton finds their source through linecache."""
    return Mods(text)


_binaries: dict[tuple[str, Target], Binary] = {}


def binary(key: str, target: Target, build: Callable[[], Source]) -> Binary:
    """The compiled kernel for `key`, which must say everything that `build()` depends on."""
    if not ready(key, target):
        found = _binaries[key, target] = compiled(build(), target)
        compile.write(_file(key, target), ".gpu", _packed(found))
    return _binaries[key, target]


def ready(key: str, target: Target) -> bool:
    """Whether `binary` finds the kernel in a cache, without a compiler."""
    if (key, target) not in _binaries:
        data = compile.read(_file(key, target), ".gpu")
        if data is None:
            return False
        _binaries[key, target] = _unpacked(data)
    return True


def _file(key: str, target: Target) -> str:
    facts = (key, target, triton_version(), compile.generators())
    return hashlib.sha256(repr(facts).encode()).hexdigest()


@cache
def triton_version() -> str:
    for package in ("triton", "pytorch-triton", "pytorch-triton-rocm"):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def _packed(found: Binary) -> bytes:
    facts = {k: v for k, v in asdict(found).items() if k not in ("code", "stages")}
    head = json.dumps(facts).encode()
    return struct.pack("<I", len(head)) + head + found.code


def _unpacked(data: bytes) -> Binary:
    end = 4 + struct.unpack_from("<I", data)[0]
    return Binary(code=data[end:], **json.loads(data[4:end]))


def compiled(source: Source, target: Target) -> Binary:
    """Compiles without looking at our caches."""
    stages, known = _lowered(source, target)
    *_, code = stages.values()
    assert not known["global_scratch_size"] if target.backend == "cuda" else True
    layout = (_ptx_layout(stages["ptx"]) if target.backend == "cuda"
              else _layout(source.signature.values()))
    texts = {stage: text for stage, text in stages.items() if isinstance(text, str)}
    return Binary(known["name"], code, layout, known["shared"],
                  known["num_warps"] * target.warp_size, texts)


def _lowered(source: Source, target: Target) -> tuple[dict[str, Any], dict[str, Any]]:
    """What each stage of Triton's compiler gives, machine code last, and what it says of it.

    triton.compile would first read and hash all of Triton (half a gigabyte, a fifth of the time of
    a kernel) for a cache of its own.
    """
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import ASTSource, make_backend
    from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

    kind = GluonASTSource if isinstance(source.kernel, GluonJITFunction) else ASTSource
    attributes = {path: [["tt.divisibility", size]] for path, size in source.aligned.items()}
    program = kind(source.kernel, dict(source.signature), dict(source.constants), attributes)
    gpu = GPUTarget(target.backend, target.arch, target.warp_size)
    backend = make_backend(gpu)
    options = backend.parse_options({**source.options, **program.parse_options()})
    lower: dict[str, Any] = {}
    backend.add_stages(lower, options, program.language)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    module = program.make_ir(gpu, options, backend.get_codegen_implementation(options),
                             backend.get_module_map(), context)
    known, made = dict(vars(options)), {}
    for stage in list(lower)[list(lower).index(program.ext):]:
        module = lower[stage](module, known)
        if stage == "ptx":
            module = assembled_rightly(module)
        made[stage] = module
    return made, known


# The parameters' layout

_PTX_CODES = {"8": "b", "16": "h", "32": "i", "64": "q"}
_CODES = {"i1": "b", "i8": "b", "u8": "B", "i16": "h", "i32": "i", "i64": "q", "fp32": "f",
          "fp64": "d"}


def _ptx_layout(text: str) -> str:
    """From the entry's parameters: `.param .u64 ...`, `.param .align 64 .b8 name[128]`."""
    entry = re.search(r"\.entry[^(]*\((.*?)\)", text, re.DOTALL)
    assert entry, "PTX without an entry"
    items = []
    for line in entry[1].split(","):
        array = re.search(r"\.align (\d+) \.b8 \w+\[(\d+)\]", line)
        scalar = re.search(r"\.param \.([usfb])(\d+)", line)
        if array:
            items.append((f"{array[2]}s", int(array[2]), int(array[1])))
        elif scalar:
            size = int(scalar[2]) // 8
            code = ("f" if size == 4 else "d") if scalar[1] == "f" else _PTX_CODES[scalar[2]]
            items.append((code, size, size))
    return _padded(items)


def _layout(types: Sequence[Any] | Any) -> str:
    """From the signature; two pointers that Triton adds come last."""
    codes = ["q" if t.startswith("*") else _CODES[t] for t in leaves(types)]
    return _padded([(c, struct.calcsize(c), struct.calcsize(c)) for c in [*codes, "q", "q"]])


def _padded(items: Sequence[tuple[str, int, int]]) -> str:
    """items: code, size, alignment."""
    text, offset = "<", 0
    for code, size, alignment in items:
        gap = -offset % alignment
        text += f"{gap}x{code}" if gap else code
        offset += gap + size
    return text


def leaves(types: Any) -> list[str]:
    """The types of a signature's run-time values, in order."""
    found: list[str] = []
    for t in types:
        if isinstance(t, tuple):
            found += leaves(t)
        elif t != "constexpr":
            found.append(t)
    return found
