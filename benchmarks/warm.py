"""Compiles what a run will time, many cases at once, each in a process of its own.

In: a suite's name, its sections, and `parts`: by section, the option that chooses a part of it and
that option's values. Effect: kernels and compiled peers lie in the caches on disk that the
environment names (FLEXATTN_CACHE_DIR, TORCHINDUCTOR_CACHE_DIR), so that timing need not wait for
compilers, of which some take minutes. A part that fails does so again, and says why, when timed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from rich.progress import track

Parts = Mapping[str, tuple[str, Sequence[str]]]


def jobs(suite: str, sections: Iterable[str], parts: Parts) -> list[list[str]]:
    """The arguments of `benchmarks.run` for each part of these sections.

    Examples:
        >>> jobs("gpu", ["heavy"], {"heavy": ("--cases", ["t5"])})
        [['--suite', 'gpu', '--sections', 'heavy', '--rounds', '1', '--cases', 't5']]
    """
    found = []
    for section in sections:
        words = ["--suite", suite, "--sections", section, "--rounds", "1"]
        option, values = parts.get(section, ("", ()))
        found += [[*words, option, value] for value in values] or [words]
    return found


def warm(suite: str, sections: Iterable[str], parts: Parts, processes: int) -> None:
    """Runs all parts once, so many at a time."""
    with tempfile.TemporaryDirectory() as out, ThreadPoolExecutor(processes) as pool:
        def run(words: list[str]) -> None:
            subprocess.run([sys.executable, "-m", "benchmarks.run", *words, "--out", out],
                           capture_output=True)

        todo = jobs(suite, sections, parts)
        for _ in track(pool.map(run, todo), "compiling", len(todo)):
            pass
