"""The examples run; each asserts what it claims."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("name", SCRIPTS)
def test_example_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "finetune_packed" and not os.environ.get("CI"):
        pytest.importorskip("transformers")
    importlib.import_module(f"examples.{name}").main()
    assert capsys.readouterr().out
