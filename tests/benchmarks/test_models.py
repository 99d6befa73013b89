"""The models suite on a model small enough for a test: who is measured, and what a row says."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch

if importlib.util.find_spec("transformers") is None and not os.environ.get("CI"):
    pytest.skip("needs transformers: pip install -e '.[dev]'", allow_module_level=True)

import transformers

from benchmarks import models

OPTIONS = argparse.Namespace(rounds=1, providers=[], cases=[], device="cpu")


def tiny(kind: type) -> models.Workload:
    sizes = models._sizes(32, 32, 4, 2, 16, 2, 64, 16)
    return models.Workload("tiny", kind(**sizes), 2, 64, torch.float32, "cpu")


@pytest.mark.parametrize("kind, peers", [
    (transformers.Gemma2Config, {"eager"}), (transformers.MistralConfig, {"eager", "sdpa"})])
def test_training_measures_every_provider_that_can(kind: type, peers: set[str]) -> None:
    found = models._compare(tiny(kind), models._training_step, OPTIONS)
    rows = {row.provider: row for row in found}
    assert rows.keys() == {"ours", models.WITHOUT} | peers
    assert rows["ours"].ours_is_faster is None
    assert all(row.value > 0 and row.rate_unit == "% attention" for row in rows.values())
    assert rows[models.WITHOUT].rate == 0


def test_generation_makes_the_tokens_asked_for() -> None:
    workload = tiny(transformers.MistralConfig)
    made = models._generation(models._model(workload), workload, 5)()
    assert made.shape == (2, 69)
    assert len(list(models._compare(workload, partial(models._generation, new=2), OPTIONS))) == 4


def test_a_provider_that_cannot_run_is_said_and_left_out(capsys: pytest.CaptureFixture) -> None:
    workload = tiny(transformers.MistralConfig)

    def make(net: object, _: models.Workload) -> Callable[[], object]:
        def run() -> None:
            if net.config._attn_implementation == "eager":  # type: ignore[attr-defined]
                raise torch.OutOfMemoryError("too large")
        return run

    found = {row.provider for row in models._compare(workload, make, OPTIONS)}
    assert found == {"ours", "sdpa", models.WITHOUT}
    assert "tiny, eager: OutOfMemoryError: too large" in capsys.readouterr().err


def test_providers_and_cases_are_chosen() -> None:
    options = argparse.Namespace(**{**vars(OPTIONS), "providers": ["ours"], "cases": ["gemma2"]})
    workload = tiny(transformers.MistralConfig)
    found = models._compare(workload, models._training_step, options)
    assert [row.provider for row in found] == ["ours", models.WITHOUT]
    for workloads in (models.small, models.large, models.served):
        assert {w.name for w in workloads()} <= set(models.CASES)
        assert {w.name for w in models._chosen(workloads(), options)} <= {"gemma2"}


@pytest.mark.parametrize("workloads, make", [
    (models.large, models._training_step), (models.served, partial(models._generation, new=2))])
def test_what_a_gpu_is_given_runs_when_it_is_small(
        workloads: Callable, make: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = models._sizes
    monkeypatch.setattr(models, "_sizes", lambda *_: sizes(32, 32, 4, 2, 16, 2, 64, 16))
    for workload in workloads():
        small = replace(workload, batch=2, length=64, dtype=torch.float32, device="cpu")
        assert {row.provider for row in models._compare(small, make, OPTIONS)} >= {"ours", "eager"}


def test_attention_is_all_that_is_left_out() -> None:
    """Values of the own position, for each query head."""
    value = torch.randn(1, 2, 6, 3)
    out, _ = models._values_alone(torch.nn.Identity(), torch.zeros(1, 4, 4, 3), value, value)
    assert out.shape == (1, 4, 4, 3)
    torch.testing.assert_close(out[0, 1, 3], value[0, 1, 3])
