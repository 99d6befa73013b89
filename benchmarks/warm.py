"""Compiles what a run will time, many cases at once, each in a process of its own.

In: a suite's name, its sections, `parts`: by section, the option that chooses a part of it and that
option's values, and the options that the run was given. Effect: kernels and compiled peers lie in
the caches on disk that the environment names (FLEXATTN_CACHE_DIR, TORCHINDUCTOR_CACHE_DIR), so that
timing need not wait for compilers, of which some take minutes. A part that fails does so again, and
says why, when timed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from rich.progress import track

Parts = Mapping[str, tuple[str, Sequence[str]]]
Options = Mapping[str, Sequence[str]]  # "--name" -> values


def jobs(suite: str, sections: Iterable[str], parts: Parts, given: Options) -> list[list[str]]:
    """The arguments of `benchmarks.run` for each part of these sections that the run has.

    Examples:
        >>> jobs("gpu", ["heavy"], {"heavy": ("--cases", ["t5"])}, {"--providers": ["ours"]})
        [['--suite', 'gpu', '--sections', 'heavy', '--rounds', '1', '--providers', 'ours', \
'--cases', 't5']]
    """
    found = []
    for section in sections:
        option, values = parts.get(section, ("", ()))
        words = ["--suite", suite, "--sections", section, "--rounds", "1"]
        for name, chosen in given.items():
            if chosen and name != option:
                words += [name, *chosen]
        found += [[*words, option, value] for value in given.get(option) or values] or [words]
    return found


def warm(suite: str, sections: Iterable[str], parts: Parts, given: Options,
         processes: int) -> None:
    """Runs all parts once, so many at a time."""
    with tempfile.TemporaryDirectory() as out, ThreadPoolExecutor(processes) as pool:
        def run(words: list[str]) -> None:
            subprocess.run([sys.executable, "-m", "benchmarks.run", *words, "--out", out],
                           capture_output=True)

        todo = jobs(suite, sections, parts, given)
        for _ in track(pool.map(run, todo), "compiling", len(todo)):
            pass
