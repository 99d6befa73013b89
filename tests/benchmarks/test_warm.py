"""Every part of a suite becomes a process's arguments, which the runner takes."""

from __future__ import annotations

import pytest

from benchmarks import gpu, models, run
from benchmarks.warm import jobs


@pytest.mark.parametrize("name, suite", [("gpu", gpu), ("models", models)])
def test_all_parts_are_run(name, suite):
    parts = getattr(suite, "PARTS", {})
    found = jobs(name, suite.SECTIONS, parts, {})
    assert len(found) == sum(len(parts[s][1]) if s in parts else 1 for s in suite.SECTIONS)
    parser = run.arguments()
    for words in found:
        options = parser.parse_args(words)
        run._complete(parser, options, suite)
        assert options.rounds == 1 and options.suite == name


def test_a_part_of_a_run_is_warmed_as_it_is_timed():
    words = ["--suite", "gpu", "--sections", "heavy", "plain", "corners", "--cases", "t5",
             "--head-dims", "64", "--providers", "ours", "torch_flex, 1 stage", "--device", "cuda",
             "--warm", "4"]
    parser = run.arguments()
    options = parser.parse_args(words)
    found = [parser.parse_args(w) for w in jobs("gpu", options.sections, gpu.PARTS,
                                                run._given(options))]
    assert [(o.sections, o.corners) for o in found] == [
        (["heavy"], []), (["plain"], []), *((["corners"], [c]) for c in gpu.CORNERS)]
    for each in found:
        assert (each.cases, each.head_dims, each.providers, each.device, each.warm) == (
            ["t5"], [64], options.providers, "cuda", 0)
