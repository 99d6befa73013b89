"""Every python block of README.md runs, in order, in one namespace; what a block prints, or the
error it raises, is the ```text block that follows it."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

from flexattn.errors import FlexAttnError

README = Path(__file__).parents[1] / "README.md"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks() -> list[tuple[int, str, str]]:
    """(line, code, expected text) of every python block; the text is '' where none follows."""
    text = README.read_text()
    fences = list(FENCE.finditer(text))
    found = []
    for fence, following in zip(fences, [*fences[1:], None], strict=True):
        if fence[1] == "python":
            adjoins = following and not text[fence.end():following.start()].strip()
            shown = following[2] if following and adjoins and following[1] == "text" else ""
            found.append((text.count("\n", 0, fence.start(2)), fence[2], shown))
    return found


def outcome(line: int, code: str, namespace: dict[str, object]) -> str:
    """What the block prints, or its error, with line numbers as in the README."""
    printed = io.StringIO()
    compiled = compile("\n" * line + code, README.name, "exec")
    try:
        with contextlib.redirect_stdout(printed):
            exec(compiled, namespace)
    except FlexAttnError as error:
        return f"{type(error).__name__}: {error}\n"
    return printed.getvalue()


def without_line_numbers(text: str) -> str:
    return re.sub(r"line \d+", "line N", text)


def test_every_block_does_what_the_readme_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(README.parent)  # the errors quote the README's lines
    namespace: dict[str, object] = {}
    for line, code, expected in blocks():
        got = outcome(line, code, namespace)
        assert without_line_numbers(got) == without_line_numbers(expected), f"README line {line}"


def test_blocks_are_found() -> None:
    assert len(blocks()) >= 8
    assert any("Error" in expected for _, _, expected in blocks())
