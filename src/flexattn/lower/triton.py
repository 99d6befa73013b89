"""Graphs of a score mod, a mask mod and their gradient -> source text of Triton device functions.

In: graphs and the `Facts` that were proven for them. Out: the text of one module of @triton.jit
functions, usable from Triton and from Gluon kernels. Rejects nothing: every Op has an entry.

The functions, all of scalars and broadcastable tiles (generated code relies on broadcasting only,
so a tile may be [M, N] with q_idx [M, 1] and kv_idx [1, N], or transposed: q_idx [1, M],
kv_idx [N, 1]; b and h are scalars, or tiles when heads are packed into rows):

    mod_head(b, h, args)                          -> head     tuple: what depends on b and h only
    mod_rows(b, h, q_idx, args, head)             -> rows     tuple: ... and on q_idx
    mod_columns(b, h, kv_idx, args, head)         -> columns  tuple: ... and on kv_idx
    mask_mod(b, h, q_idx, kv_idx, args, parts)    -> bool, broadcastable to the tile
    score_mod(score, b, h, q_idx, kv_idx, attended, args, parts)  -> the new score, float32
    score_mod_grad(score, grad, b, h, q_idx, kv_idx, attended, args, parts)
                                                  -> (d_score, d_load0, d_load1, ...)
    grad_offsets(score, b, h, q_idx, kv_idx, args, parts)
                                                  -> (offset0, ...): elements from the start of a
                                                     contiguous tensor of the capture's shape
    score_line(b, h, q_idx, args, parts)          -> (slope, origin)  only of a score mod that is
                                                     score + slope * (kv_idx - origin) by head and
                                                     row: the same as score_mod, without scales

with parts = (head, rows, columns). Compute `head` and the part that a loop does not change before
the loop (nothing hoists loads in Gluon) and the other part in each step; parts that are not used
cost nothing. q_idx and kv_idx are int32 and must be clamped into the tensors (0 <= q_idx < q_len):
proofs of in-bounds reads rest on it. `score` is scale * SCORE_SCALE * q.k in float32, and the new
score is RESULT_SCALE times the result of score_mod, two constants of the module (1 where they are
missing); `attended` says where the result counts (mask and bounds, or True): a captured tensor read
out of range there sets the flag.

`args` is ONE kernel argument, a named tuple with the fields `argument_fields(...)` gives:

    flag                              int32 pointer; set to 1 + the number of the failed read
    score0, score0_size0, .., score0_stride0, ..    each captured tensor of the score mod
    score_number0, ...                run-time numbers (int64, float64, int8 for bool)
    mask0, ..., mask_number0, ...     the same for the mask mod

Its type is given explicitly when a kernel is compiled (`argument_types`, for ASTSource): integers
are never specialised on their value, so a new length or number is never a new compile.
compile_triton.load(text) gives the functions as one constexpr kernel argument MODS with these
names as attributes, None where there is no such function: `if MODS.mask_mod is not None:`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flexattn.ir.graph import Graph, Node
from flexattn.lower.scales import Scales
from flexattn.lower.separate import COLUMNS, HEAD, ROWS, TILE
from flexattn.lower.slope import sloped
from flexattn.lower.triton_facts import ModFacts
from flexattn.lower.triton_ops import Context, Target, plain
from flexattn.lower.triton_text import Role, Writer

_SIGNATURES = {
    "mod_head": "b, h, args",
    "mod_rows": "b, h, q_idx, args, head",
    "mod_columns": "b, h, kv_idx, args, head",
    "mask_mod": "b, h, q_idx, kv_idx, args, parts",
    "score_mod": "score, b, h, q_idx, kv_idx, attended, args, parts",
    "score_mod_grad": "score, grad, b, h, q_idx, kv_idx, attended, args, parts",
    "grad_offsets": "score, b, h, q_idx, kv_idx, args, parts",
    "score_line": "b, h, q_idx, args, parts",
}
_HEADER = """\
import triton
import triton.language as tl
from triton.language.extra import libdevice

import flexattn.kernels.device_math as math
"""
_TYPE_CODES = {
    torch.bool: "i1", torch.int8: "i8", torch.uint8: "u8", torch.int16: "i16", torch.int32: "i32",
    torch.int64: "i64", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32",
    torch.float64: "fp64",
}


@dataclass(frozen=True)
class Facts:
    """What the text depends on besides the graphs.

    fast: 16-bit attention inputs. index_bound: b, h, q_idx and kv_idx are below it. report: reads
    out of range set the flag (a backward pass leaves that to the forward).
    """

    target: Target
    fast: bool
    index_bound: int
    score: ModFacts = ModFacts()
    mask: ModFacts = ModFacts()
    gradient: ModFacts = ModFacts()
    report: bool = True


def argument_fields(score: Graph | None, mask: Graph | None) -> tuple[str, ...]:
    """Names of the values of `args`, in order."""
    names = ["flag"]
    for role, graph in (("score", score), ("mask", mask)):
        for slot, capture in enumerate(graph.captures if graph else ()):
            name = f"{role}{slot}"
            names += [name, *(f"{name}_size{d}" for d in range(capture.rank)),
                      *(f"{name}_stride{d}" for d in range(capture.rank))]
        names += [f"{role}_number{slot}" for slot in range(len(graph.numbers) if graph else 0)]
    return tuple(names)


def argument_types(score: Graph | None, mask: Graph | None, facts: Facts) -> tuple[str, ...]:
    """The type of each value of `args`, as triton.compile takes it."""
    types = ["*i32"]
    for graph, known in ((score, facts.score), (mask, facts.mask)):
        if graph is None:
            continue
        for capture, fact in zip(graph.captures, known.captures, strict=True):
            types.append("*" + _TYPE_CODES[capture.dtype])
            types += ["i64" if fact.wide else "i32"] * (2 * capture.rank)
        for dtype, bounds in zip(graph.numbers, known.numbers, strict=True):
            narrow = bounds is not None and bounds[1] < 1 << 31
            types.append("i32" if narrow else _TYPE_CODES[dtype])
    return tuple(types)


def lower(score: Graph | None, mask: Graph | None, facts: Facts,
          gradient: Graph | None = None) -> str:
    """The module's text. `gradient` has the outputs d_score, d_load0, ... and load0, ...: the
    reads that d_load<i> belongs to."""
    context = Context(facts.target, facts.fast, {})
    roles = []
    if score is not None:
        graphs = [(score, facts.score)] + ([(gradient, facts.gradient)] if gradient else [])
        roles.append(Role("score", context, facts.index_bound, graphs, facts.report))
    if mask is not None:
        roles.append(Role("mask", context, facts.index_bound, [(mask, facts.mask)], facts.report))
    texts = [_HEADER, *(_constants(role.scales) for role in roles if role.scales != Scales()),
             *_hoisted_functions(roles)]
    for role in roles:
        texts += [_mask_mod(role)] if role.prefix == "mask" else [_score_mod(role), *_slope(role)]
    if gradient is not None:
        texts += [_score_mod_grad(roles[0]), _grad_offsets(roles[0])]
    return "\n\n".join(texts)


def _constants(scales: Scales) -> str:
    return f"SCORE_SCALE = {scales.score!r}\nRESULT_SCALE = {scales.result!r}\n"


def _function(name: str, lines: list[str], result: str) -> str:
    body = "\n".join(f"    {line}" for line in [*lines, f"return {result}"])
    for part in ("head", "rows", "columns"):
        if name.startswith("mod_"):
            break
        if f"{part}[" in body:
            unpack = "    head, rows, columns = parts\n"
            body = unpack + body
            break
    return f"@triton.jit\ndef {name}({_SIGNATURES[name]}):\n{body}\n"


def _tuple(values: list[str]) -> str:
    return f"({', '.join(values)}{',' if len(values) == 1 else ''})"


def _hoisted_functions(roles: list[Role]) -> list[str]:
    texts = []
    for level, name in ((HEAD, "mod_head"), (ROWS, "mod_rows"), (COLUMNS, "mod_columns")):
        lines: list[str] = []
        values: list[str] = []
        for role in roles:
            role.offset[level] = len(values)
            writer = Writer(role, level, lines)
            values += [plain(writer.value(n)) for n in role.hoisted[level]]
            values += [writer.outside[n] for n in role.reported(level)]
        texts.append(_function(name, lines, _tuple(values)))
    return texts


def _reports(writer: Writer, root: Node, attended: str) -> None:
    """Stores that set the flag where a read left its tensor at an attended position."""
    for n in writer.reported_reads(root):
        left = writer.name(f"{writer.outside[n]} & {attended}", "left")
        number = writer.role.reads[n].number + 1
        code = number if writer.role.prefix == "score" else -number
        writer.lines.append(
            f"tl.store(args.flag + {left}.to(tl.int32) * 0, {code}, mask={left})")


def _whole_tile(writer: Writer, n: Node, tile: str) -> str:
    """The value of a node in the shape of `tile`."""
    text = writer.value(n)
    if writer.role.level[n] == TILE:
        return text
    return f"tl.where({tile} == {tile}, {text}, {text})"


def _score_mod(role: Role) -> str:
    writer = Writer(role, TILE, [])
    root = role.root("score")
    result = plain(_whole_tile(writer, root, "score"))
    _reports(writer, root, "attended")
    return _function("score_mod", writer.lines, result)


def _slope(role: Role) -> list[str]:
    """score_line, where the score mod has this form and reads nothing out of range."""
    root = role.root("score")
    found = sloped(root, role.level)
    if found is None or role.scales != Scales():
        return []
    writer = Writer(role, TILE, [])
    negative, slope, origin = found
    values = [plain(writer.value(n)) for n in (slope, origin)]
    writer.value(root)
    if writer.reported_reads(root):
        return []
    values[0] = f"-({values[0]})" if negative else values[0]
    return [_function("score_line", [], _tuple(values))]


def _mask_mod(role: Role) -> str:
    writer = Writer(role, TILE, [])
    root = role.root("mask")
    result = plain(writer.value(root))
    if root.is_const:
        result = "q_idx >= 0" if root.attr else "q_idx < 0"
    if writer.reported_reads(root):
        result = writer.name(result, "attended")
        _reports(writer, root, result)
    return _function("mask_mod", writer.lines, result)


def _score_mod_grad(role: Role) -> str:
    writer = Writer(role, TILE, [])
    names = [name for name, _ in role.graph.outputs if name.startswith("d_")]
    values = [plain(_whole_tile(writer, role.root(name), "grad")) for name in names]
    return _function("score_mod_grad", writer.lines, _tuple(values))


def _grad_offsets(role: Role) -> str:
    writer = Writer(role, TILE, [])
    loads = [n for name, n in role.graph.outputs if name.startswith("load")]
    offsets = [writer.offset(n) for n in loads]
    return _function("grad_offsets", writer.lines, _tuple(offsets))
