"""Every part of a suite becomes a process's arguments, which the runner takes."""

from __future__ import annotations

import pytest

from benchmarks import gpu, models, run
from benchmarks.warm import jobs


@pytest.mark.parametrize("name, suite", [("gpu", gpu), ("models", models)])
def test_all_parts_are_run(name, suite):
    parts = getattr(suite, "PARTS", {})
    found = jobs(name, suite.SECTIONS, parts)
    assert len(found) == sum(len(parts[s][1]) if s in parts else 1 for s in suite.SECTIONS)
    parser = run.arguments()
    for words in found:
        options = parser.parse_args(words)
        run._complete(parser, options, suite)
        assert options.rounds == 1 and options.suite == name
