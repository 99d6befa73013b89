"""Rows of a benchmark: what they hold, the table that is printed, the CSV that is kept.

A CSV lies at benchmarks/results/<machine>/<suite>-<section>.csv and starts with `# key: value`
lines (machine, versions, commit, date), so that a number never travels without its origin.
"""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from tabulate import tabulate

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One provider in one case. `ours_is_faster` is its time over ours, the median over rounds
    of one run; `rate` is in GFLOP/s of attended work, or whatever `unit` says."""

    case: str
    shape: str
    dtype: str
    provider: str
    value: float
    unit: str = "ms"
    spread: float = 0.0
    rate: float = 0.0
    rate_unit: str = "GFLOP/s"
    ours_is_faster: float | None = None


def _command(*words: str) -> str:
    try:
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def cpu_name() -> str:
    """The processor's model: 'AMD EPYC', 'Apple M2', ..."""
    if platform.system() == "Darwin":
        return _command("sysctl", "-n", "machdep.cpu.brand_string")
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def machine(device: str = "cpu") -> str:
    """A directory name: processor, cores and the vectors torch uses, or the accelerator."""
    name = (f"{cpu_name()} {os.cpu_count()} cores {torch.backends.cpu.get_cpu_capability()}"
            if device == "cpu" else torch.get_device_module(device).get_device_name())
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def origin(device: str = "cpu") -> dict[str, str]:
    """Where and of what these numbers were taken."""
    dirty = _command("git", "status", "--porcelain", "--untracked-files=no", "--", "src")
    return {
        "machine": machine(device),
        "cpu": f"{cpu_name()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "threads": str(torch.get_num_threads()),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        **{package: _version(package) for package in ("torch", "llvmlite", "triton")},
        "commit": _command("git", "rev-parse", "--short", "HEAD") + (" + changes" if dirty else ""),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def write(rows: Iterable[Row], suite: str, section: str, device: str = "cpu",
          folder: Path = RESULTS) -> Path:
    """Writes the CSV and returns its path."""
    path = folder / machine(device) / f"{suite}-{section}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        file.writelines(f"# {key}: {value}\n" for key, value in origin(device).items())
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v
                          for k, v in asdict(row).items()} for row in rows)
    return path


def table(rows: Sequence[Row]) -> str:
    """One line a case: our time and rate, then how many times as fast ours is as each peer."""
    peers = list(dict.fromkeys(r.provider for r in rows if r.provider != "ours"))
    cases: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault((row.case, row.shape, row.dtype), {})[row.provider] = row
    lines = []
    for key, found in cases.items():
        mine = found.get("ours")
        lines.append([*key, *_own(mine), *(_ratio(found.get(peer)) for peer in peers)])
    headers = ["case", "shape", "dtype", "ours", "", "+-", *(f"vs {peer}" for peer in peers)]
    return tabulate(lines, headers, disable_numparse=True,
                    colalign=("left", "left", "left", *("right",) * (len(headers) - 3)))


def _own(row: Row | None) -> list[str]:
    if row is None:
        return ["", "", ""]
    rate = f"{row.rate:.1f} {row.rate_unit}" if row.rate else ""
    return [f"{row.value:.4g} {row.unit}", rate, f"{row.spread:.0%}" if row.spread else ""]


def _ratio(row: Row | None) -> str:
    return "" if row is None or row.ours_is_faster is None else f"{row.ours_is_faster:.2f}x"
