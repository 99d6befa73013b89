"""Kernels on Triton's interpreter: needs TRITON_INTERPRET=1 before Triton is imported, so these
run in a process of their own (tests/test_interpreter.py starts it)."""

from __future__ import annotations

import os

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "interpreter" in item.path.parts and not INTERPRETED:
            item.add_marker(pytest.mark.skip(reason="tests/test_interpreter.py runs it"))
