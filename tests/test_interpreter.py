"""Runs tests/interpreter with TRITON_INTERPRET=1 in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
FILES = sorted((Path(__file__).parent / "interpreter").glob("test_*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_kernels_on_the_interpreter(path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "pytest", "-x", str(path)],
                          env={**os.environ, "TRITON_INTERPRET": "1"},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
