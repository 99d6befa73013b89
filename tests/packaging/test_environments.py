"""flexattn where users run it: two ranks on one cold cache, a home that cannot be written, numba
in the same process, a quick import."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.packaging.test_wheel import ATTEND, OPTIONAL


def python(code: str, **environment: str) -> subprocess.Popen[str]:
    """A fresh interpreter, with our cache variables only where given."""
    kept = {k: v for k, v in os.environ.items() if k not in ("FLEXATTN_CACHE_DIR",
                                                             "XDG_CACHE_HOME")}
    return subprocess.Popen([sys.executable, "-c", code], env={**kept, **environment}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def output(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    return out


def test_two_ranks_start_cold_on_one_cache(tmp_path: Path) -> None:
    """Both compile at once; a third process then finds everything compiled."""
    cache, meeting = tmp_path / "cache", tmp_path / "meeting"
    rank = ("import sys, torch.distributed as dist\n"
            f"dist.init_process_group('gloo', init_method='file://{meeting}', world_size=2, "
            "rank={rank})\ndist.barrier()\n" + ATTEND.replace("{", "{{").replace("}", "}}"))
    ranks = [python(rank.format(rank=i), FLEXATTN_CACHE_DIR=str(cache)) for i in range(2)]
    for process in ranks:
        output(process)
    assert list(cache.glob("*.o")) and not list(cache.glob(".new-*"))
    warm = ("from flexattn import compile\n"
            "def compiled(*_): raise AssertionError('compiled again')\n"
            "compile.compile_object = compiled\n")
    output(python(warm + ATTEND, FLEXATTN_CACHE_DIR=str(cache)))


def test_a_home_that_cannot_be_written(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.write_text("a file: nothing can be made below it, not even by root")
    code = ATTEND + "\nfrom flexattn import compile\nprint(compile.cache_directory())"
    told = output(python(code, HOME=str(home)))
    assert told.strip() == "None"


@pytest.mark.parametrize("first", ["numba", "flexattn"])
def test_numba_in_the_same_process(first: str) -> None:
    if importlib.util.find_spec("numba") is None and not os.environ.get("CI"):
        pytest.skip("needs numba: pip install -e '.[dev]'")
    numba = "import numba\nassert numba.njit(lambda x: x + 1)(2) == 3\n"
    code = numba + ATTEND if first == "numba" else ATTEND + numba
    output(python(code + numba))


def test_optional_packages_are_not_imported() -> None:
    """Beyond those that torch imports itself."""
    told = output(python("import sys, torch\nbefore = set(sys.modules)\nimport flexattn\n"
                         "import flexattn.pictures, flexattn.integrations.transformers\n"
                         f"print(sorted(set({OPTIONAL!r}) & (set(sys.modules) - before)))"))
    assert told.strip() == "[]"


def test_import_costs_a_quarter_second_beyond_torchs() -> None:
    """Processor time, the least of five: other programs do not count. With bytecode, as pip
    installs it: the first of the five writes it."""
    code = ("import time, torch\nstart = time.process_time()\nimport flexattn\n"
            "print(time.process_time() - start)")
    costs = [float(output(python(code, PYTHONDONTWRITEBYTECODE=""))) for _ in range(5)]
    assert min(costs) < 0.25, costs
