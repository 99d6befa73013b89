"""Every block of README.md and docs/ runs.

The ```python blocks of a page run in order, in one namespace; what a block prints, or the error it
raises, is the ```text block that follows it. Each `$ flexattn ...` of a ```console block is run.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch

from flexattn import masks, mods
from flexattn.errors import FlexAttnError

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[int, str, str]]:
    """(line, code, expected text) of every python block; the text is '' where none follows."""
    text = page.read_text()
    fences = list(FENCE.finditer(text))
    found = []
    for fence, following in zip_longest(fences, fences[1:]):
        if fence[1] == "python":
            adjoins = following and not text[fence.end():following.start()].strip()
            shown = following[2] if following and adjoins and following[1] == "text" else ""
            found.append((text.count("\n", 0, fence.start(2)), fence[2], shown))
    return found


def outcome(page: Path, line: int, code: str, namespace: dict[str, Any]) -> str:
    """What the block prints, or its error, with line numbers as in the page."""
    printed = io.StringIO()
    compiled = compile("\n" * line + code, str(page.relative_to(ROOT)), "exec")
    try:
        with contextlib.redirect_stdout(printed):
            exec(compiled, namespace)
    except FlexAttnError as error:
        return f"{type(error).__name__}: {error}\n"
    return printed.getvalue()


def without_line_numbers(text: str) -> str:
    return re.sub(r"line \d+", "line N", text)


def names(page: Path) -> dict[str, Any]:
    """The gallery's blocks are expressions of the names it shows."""
    return {"torch": torch, **vars(masks), **vars(mods)} if page.stem == "gallery" else {}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_does_what_the_page_says(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page.stem == "transformers":
        pytest.importorskip("transformers")
    monkeypatch.chdir(ROOT)  # the errors quote the page's lines
    monkeypatch.setattr("flexattn.trace.tracer._skeletons", {})  # numbers seen in other tests
    torch.manual_seed(0)
    namespace = names(page)
    for line, code, expected in blocks(page):
        got = outcome(page, line, code, namespace)
        assert without_line_numbers(got) == without_line_numbers(expected), f"{page.name}:{line}"


def commands() -> list[str]:
    """Every command line of the pages that starts with flexattn."""
    texts = (fence[2] for page in PAGES for fence in FENCE.finditer(page.read_text())
             if fence[1] == "console")
    return [line[2:] for text in texts for line in text.splitlines()
            if line.startswith("$ flexattn ")]


@pytest.mark.parametrize("line", commands())
def test_every_command_runs(line: str) -> None:
    testing = pytest.importorskip("typer.testing")
    from flexattn.cli.app import app

    result = testing.CliRunner().invoke(app, shlex.split(line)[1:])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip()


def test_blocks_are_found() -> None:
    assert len(blocks(ROOT / "README.md")) >= 8
    assert len(blocks(ROOT / "docs" / "troubleshooting.md")) >= 15
    assert any("Error" in expected for page in PAGES for _, _, expected in blocks(page))
    assert len(commands()) >= 5
