"""Every pass owns an Op-keyed TABLE; each covers every operation, so that a new one cannot be
forgotten by a pass (entries that say "not differentiable" or "unbounded" are entries too)."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

from flexattn import analysis, ir, lower
from flexattn.ir.ops import LEAVES, Op


def modules_with_a_table() -> list[str]:
    found = [module.name for package in (ir, analysis, lower)
             for module in pkgutil.iter_modules(package.__path__, package.__name__ + ".")]
    return [name for name in found if hasattr(importlib.import_module(name), "TABLE")]


def test_tables_are_found() -> None:
    assert "flexattn.ir.evaluate" in modules_with_a_table()


@pytest.mark.parametrize("module", modules_with_a_table())
def test_table_covers_every_operation(module: str) -> None:
    table = importlib.import_module(module).TABLE
    assert set(table) <= set(Op), "keys are operations"
    missing = set(Op) - set(table) - LEAVES
    assert not missing, f"{module}.TABLE lacks {sorted(op.name for op in missing)}"
