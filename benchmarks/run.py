"""`python -m benchmarks.run --suite cpu`: runs a suite, prints its tables, writes its CSVs.

A suite is a module with SECTIONS: name -> function(options) -> rows, and with CASES, PROVIDERS and
DEVICE where they are not those of the CPU. `--sections`, `--cases` and the like choose parts; a
partial run writes only the sections it ran. `--warm` compiles before it times.
"""

from __future__ import annotations

import argparse
import importlib
import time
from pathlib import Path
from types import ModuleType

import torch

from benchmarks import report
from benchmarks.cases import CASES
from benchmarks.providers import PROVIDERS
from benchmarks.warm import warm

SUITES = {
    "block_mask": "benchmarks.block_mask",
    "cpu": "benchmarks.cpu",
    "gpu": "benchmarks.gpu",
    "models": "benchmarks.models",
}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--suite", choices=sorted(SUITES), default="cpu")
    parser.add_argument("--sections", nargs="+", default=[], help="default: all of the suite")
    parser.add_argument("--cases", nargs="+", default=[], help="default: all of the suite")
    parser.add_argument("--corners", nargs="+", default=[], help="shapes of the section `corners`")
    parser.add_argument("--providers", nargs="+", default=[], help="default: those of the suite")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048])
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warm", type=int, default=0,
                        help="first run all of it once, so many at a time, to fill the caches")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="", help="whose name the results carry")
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    return parser


def _complete(parser: argparse.ArgumentParser, options: argparse.Namespace,
              suite: ModuleType) -> None:
    """Checks names, and sets what depends on the suite."""
    options.device = options.device or getattr(suite, "DEVICE", "cpu")
    of_cpu = not hasattr(suite, "DEVICE")
    known = {"sections": suite.SECTIONS, "corners": getattr(suite, "CORNERS", {}),
             "cases": CASES if of_cpu else suite.CASES, "providers": PROVIDERS if of_cpu
             else suite.PROVIDERS}
    for name, choices in known.items():
        unknown = set(getattr(options, name)) - set(choices)
        if unknown:
            parser.error(f"--{name}: {', '.join(sorted(unknown))} not in {', '.join(choices)}")
    if of_cpu:
        options.cases = options.cases or list(CASES)
        options.providers = options.providers or ["ours", "torch_flex", "sdpa"]


def _given(options: argparse.Namespace) -> dict[str, list[str]]:
    """What chooses the kernels that run, as words of a command line."""
    names = ("cases", "corners", "providers", "dtypes", "lengths", "head_dims")
    lists = {"--" + name.replace("_", "-"): list(map(str, getattr(options, name)))
             for name in names}
    return lists | {"--device": [options.device]}


def main(words: list[str] | None = None) -> None:
    parser = arguments()
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    suite = importlib.import_module(SUITES[options.suite])
    sections = suite.SECTIONS
    _complete(parser, options, suite)
    if options.warm:
        warm(options.suite, options.sections or sections, getattr(suite, "PARTS", {}),
             _given(options), options.warm)
    for key, value in report.origin(options.device).items():
        print(f"{key}: {value}")
    for name in options.sections or sections:
        start = time.perf_counter()
        rows: list[report.Row] = []
        path = None
        for row in sections[name](options):
            rows.append(row)
            path = report.write(rows, options.suite, name, options.device, options.out)
            print(f"\r  {name}: {row.case} {row.shape} {row.dtype} {row.provider}", end="\x1b[K",
                  flush=True)
        print(f"\r\x1b[K\n{name} ({time.perf_counter() - start:.0f} s, {path})")
        print(report.table(rows), flush=True)


if __name__ == "__main__":
    main()
