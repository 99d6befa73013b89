"""Imports go one way: the layer order that docs/architecture.md states is the one the code has.

Every import in src/flexattn counts, also those inside functions and under TYPE_CHECKING.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "flexattn"
MODULES = sorted(p for p in SOURCE.rglob("*.py") if p != SOURCE / "__init__.py")
USER_LEVEL = {"masks", "mods"}  # what users could have written themselves
KERNEL_DSL = {"llvmlite", "triton"}


def layers() -> dict[str, int]:
    """Room -> its level; rooms of one level (separated by a comma) are peers."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    order = re.search(r"## Layers\s+`(errors < [^`]+)`", text)
    assert order, "docs/architecture.md: no layer order below '## Layers'"
    return {room.strip(): level for level, rooms in enumerate(order[1].split("<"))
            for room in rooms.split(",")}


def name_of(path: Path) -> str:
    """'flexattn.ir.graph' for src/flexattn/ir/graph.py."""
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Dotted names of everything the file imports, `from x import y` given as x.y."""
    package = name_of(path).split(".") + ([""] if path.name == "__init__.py" else [])
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[:-node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def room_of(module: str) -> str:
    """'ir' for flexattn.ir.graph; '' for the package itself."""
    return (module.split(".") + [""])[1]


def own_imports(path: Path) -> set[str]:
    return {m for m in imports(path) if m.split(".")[0] == "flexattn"}


def foreign_imports(path: Path) -> set[str]:
    """Top-level packages that are neither ours nor the standard library's."""
    tops = {m.split(".")[0] for m in imports(path)}
    return tops - set(sys.stdlib_module_names) - {"flexattn"}


def may_import(importer: str, imported: str) -> bool:
    """Whether a file of one room may import from another room."""
    level = layers()
    if importer == "reference":
        return False
    if importer in USER_LEVEL:
        return imported in {importer, "errors"}
    if imported not in level:
        return importer in {"integrations", "distributed", "cli"}
    return imported == importer or level[imported] < level[importer]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_file_belongs_to_a_room(path: Path) -> None:
    known = set(layers()) | USER_LEVEL | {"reference"}
    assert room_of(name_of(path)) in known, "say in docs/architecture.md where this file belongs"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_down(path: Path) -> None:
    importer = room_of(name_of(path))
    wrong = {m for m in own_imports(path) if not may_import(importer, room_of(m))}
    assert not wrong, f"{name_of(path)} must not import {sorted(wrong)}"


@pytest.mark.parametrize("path", sorted((SOURCE / "kernels").glob("*.py")), ids=name_of)
def test_kernels_import_only_their_language(path: Path) -> None:
    ours = {room_of(m) for m in own_imports(path)}
    assert ours <= {"kernels"}
    assert foreign_imports(path) <= KERNEL_DSL


@pytest.mark.parametrize("importer, imported, allowed", [
    ("ir", "errors", True), ("errors", "ir", False), ("trace", "analysis", False),
    ("kernels", "ir", True), ("block_mask", "compile", True), ("compile", "block_mask", False),
    ("reference", "errors", False), ("mods", "errors", True), ("mods", "ir", False),
    ("attention", "runtime", True), ("cli", "distributed", False), ("ir", "ir", True),
    ("runtime", "mods", False), ("cli", "masks", True),
])
def test_the_rule_itself(importer: str, imported: str, allowed: bool) -> None:
    assert may_import(importer, imported) is allowed


def test_imports_are_read_in_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SOURCE", tmp_path / "flexattn")
    file = tmp_path / "flexattn" / "ir" / "probe.py"
    file.parent.mkdir(parents=True)
    file.write_text("import flexattn.trace\nfrom . import graph\nfrom ..lower import llvm\n"
                    "def f():\n    from flexattn.compile import load\n")
    assert imports(file) == {"flexattn.trace", "flexattn.ir.graph", "flexattn.lower.llvm",
                             "flexattn.compile.load"}
