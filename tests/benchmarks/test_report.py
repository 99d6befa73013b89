"""The table's ratios, and CSVs that say where their numbers are from."""

from __future__ import annotations

import csv
import random
from pathlib import Path

from benchmarks import report
from benchmarks.report import Row


def rows(ratio: float) -> list[Row]:
    return [Row("causal", "B1 H8 S2048 D64", "float32", "ours", 2.0, rate=120.0, spread=0.04),
            Row("causal", "B1 H8 S2048 D64", "float32", "sdpa", 3.0, ours_is_faster=ratio),
            Row("full", "B1 H8 S2048 D64", "float32", "ours", 5.0)]


def test_table_has_a_line_per_case() -> None:
    ratio = random.uniform(1, 9)
    header, _, causal, full = report.table(rows(ratio)).splitlines()
    assert "vs sdpa" in header and "vs ours" not in header
    assert f"{ratio:.2f}x" in causal and "120.0 GFLOP/s" in causal and "4%" in causal
    assert full.startswith("full") and "x" not in full


def test_csv_carries_its_origin(tmp_path: Path) -> None:
    path = report.write(rows(1.5), "cpu", "forward", folder=tmp_path)
    assert path == tmp_path / report.machine() / "cpu-forward.csv"
    lines = path.read_text().splitlines()
    origin = dict(line[2:].split(": ", 1) for line in lines if line.startswith("#"))
    assert {"machine", "cpu", "threads", "torch", "llvmlite", "commit", "date"} <= set(origin)
    assert origin["commit"] and origin["torch"][0].isdigit()
    found = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    assert [(r["case"], r["provider"], r["value"]) for r in found] == [
        ("causal", "ours", "2"), ("causal", "sdpa", "3"), ("full", "ours", "5")]
    assert found[1]["ours_is_faster"] == "1.5" and found[0]["ours_is_faster"] == ""


def test_machine_is_a_plain_directory_name() -> None:
    assert set(report.machine()) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
