"""The commands as a user types them: what they print, what they write, how they fail."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("typer") is None and not os.environ.get("CI"):
    pytest.skip("needs typer: pip install -e '.[dev]'", allow_module_level=True)

from typer.testing import CliRunner, Result

from flexattn.cli import doctor as examination
from flexattn.cli import tour
from flexattn.cli.app import app
from flexattn.cli.target import load
from flexattn.errors import ArgumentError

MODS = '''
import torch

CAP = torch.tensor(20.0)

def capped(score, b, h, q_idx, kv_idx):
    return CAP * torch.tanh(score / CAP)

def even(b, h, q_idx, kv_idx):
    return kv_idx % 2 == 0
'''


def run(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def run_json(*words: str) -> Any:
    result = run(*words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def mods(tmp_path: Path) -> Path:
    path = tmp_path / "my_mods.py"
    path.write_text(MODS)
    return path


def test_doctor_says_what_runs_and_checks_it() -> None:
    report = run_json("doctor")
    assert report["passed"]
    assert report["versions"]["torch"] == torch.__version__.split("+")[0] or \
        report["versions"]["torch"] == torch.__version__
    dtypes = {check["dtype"] for check in report["checks"] if check["device"] == "cpu"}
    assert dtypes == {"float32", "bfloat16", "float16"}
    assert all(check["forward"].startswith("kernels/") for check in report["checks"])
    assert "self-check" in run("doctor").stdout


def test_doctor_fails_where_a_result_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    real = examination.flexattn.flex_attention
    monkeypatch.setattr(examination.flexattn, "flex_attention", lambda *a, **k: real(*a, **k) * 1.1)
    result = run("doctor")
    assert result.exit_code == 1
    assert not json.loads(run("doctor", "--json").stdout)["passed"]


def test_explain_a_function_of_a_file(mods: Path) -> None:
    told = run_json("explain", f"{mods}:capped", "--length", "256")
    assert told["score"]["captures"] == ["float32 []"]
    assert "tanh" in told["score"]["graph"] and "@score_mod" in told["score"]["code"]
    text = run("explain", f"{mods}:capped").stdout
    assert "gradient of score_mod" in text and "forward kernel" in text


def test_explain_a_mask_for_a_gpu() -> None:
    told = run_json("explain", "flexattn.masks:causal", "--target", "gpu")
    assert told["language"] == "Triton" and "def mask_mod" in told["mask"]["code"]


def test_mask_of_an_expression() -> None:
    words = ("mask", "flexattn.masks:and_masks(causal, sliding_window(100))", "--length", "512")
    facts = run_json(*words)
    assert (facts["full"], facts["partial"], facts["empty"]) == (0, 7, 9)
    text = run(*words).stdout
    assert facts["picture"].splitlines()[0] in text and "never visited" in text


def test_mask_writes_pictures(mods: Path, tmp_path: Path) -> None:
    svg, png = tmp_path / "mask.svg", tmp_path / "mask.png"
    words = ["mask", f"{mods}:even", "--length", "300", "--kv-length", "200", "--svg", str(svg)]
    if importlib.util.find_spec("matplotlib") or os.environ.get("CI"):
        words += ["--png", str(png)]
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert svg.read_text().startswith("<svg")
    assert not words[-1].endswith("png") or png.read_bytes().startswith(b"\x89PNG")


def test_bench_measures_both(monkeypatch: pytest.MonkeyPatch) -> None:
    told = run_json("bench", "--length", "64", "--heads", "2", "--rounds", "1")
    cases = {(t["case"], t["step"]): t for t in told["timings"]}
    assert len(cases) == 12
    assert all(t["flexattn"] > 0 for t in cases.values())
    causal = cases["causal", "training"]
    assert causal["ratio"] == pytest.approx(causal["sdpa"] / causal["flexattn"])
    assert cases["causal, softcap", "forward"]["sdpa"] is None


def test_demo_shows_only_what_is_right() -> None:
    stops = run_json("demo", "--length", "96")
    assert len(stops) == 4 and all(stop["error"] < 1e-4 for stop in stops)
    assert "def causal" in run("demo", "--length", "96").stdout


def test_the_tour_draws_its_masks() -> None:
    first = next(tour.stops(256))
    assert "▒▒··" in first.shown and "██▒▒" in first.shown


@pytest.mark.parametrize("words, part", [
    ("flexattn.masks", "names no mod"),
    ("flexattn.masks:nothing", "NameError"),
    ("no_such_module:mod", "no_such_module"),
    ("missing.py:mod", "missing.py"),
    ("flexattn.masks:sliding_window", "is no mod"),
    ("flexattn.masks:sliding_window(-1)", "window"),
    ("flexattn.masks:MASKS", "NameError"),
])
def test_mistakes_are_messages(words: str, part: str) -> None:
    with pytest.raises(ArgumentError, match=part):
        load(words)
    result = run("mask", words)
    assert result.exit_code == 1 and part in result.stderr and "Traceback" not in result.output


def test_without_typer_the_remedy_is_named() -> None:
    code = "import sys; sys.modules['typer'] = None; from flexattn.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert "pip install 'flexattn[cli]'" in result.stderr and "Traceback" not in result.stderr
