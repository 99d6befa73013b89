"""`python -m benchmarks.run --suite cpu`: runs a suite, prints its tables, writes its CSVs.

A suite is a module with SECTIONS: name -> function(options) -> rows. `--sections`, `--cases` and
the like choose parts; a partial run writes only the sections it ran.
"""

from __future__ import annotations

import argparse
import importlib
import time
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.cases import CASES
from benchmarks.providers import PROVIDERS

SUITES = {
    "cpu": "benchmarks.cpu",
    "models": "benchmarks.models",
}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--suite", choices=sorted(SUITES), default="cpu")
    parser.add_argument("--sections", nargs="+", default=[], help="default: all of the suite")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--providers", nargs="+", choices=list(PROVIDERS),
                        default=["ours", "torch_flex", "sdpa"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048])
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", help="whose name the results carry")
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    return parser


def main(words: list[str] | None = None) -> None:
    parser = arguments()
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    sections = importlib.import_module(SUITES[options.suite]).SECTIONS
    unknown = set(options.sections) - set(sections)
    if unknown:
        parser.error(f"--sections: {', '.join(sorted(unknown))} not in {', '.join(sections)}")
    for key, value in report.origin(options.device).items():
        print(f"{key}: {value}")
    for name in options.sections or sections:
        start = time.perf_counter()
        rows = []
        for row in sections[name](options):
            rows.append(row)
            print(f"\r  {name}: {row.case} {row.shape} {row.dtype} {row.provider}", end="\x1b[K",
                  flush=True)
        path = report.write(rows, options.suite, name, options.device, options.out)
        print(f"\r\x1b[K\n{name} ({time.perf_counter() - start:.0f} s, {path})")
        print(report.table(rows), flush=True)


if __name__ == "__main__":
    main()
