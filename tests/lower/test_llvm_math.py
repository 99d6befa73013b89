"""Elementary functions of the LLVM lowering against 40-digit arithmetic (mpmath, which torch
brings along), in units in the last place, and their special values against Python's math."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from functools import cache

import mpmath
import numpy as np
import pytest

from flexattn import compile as objects
from flexattn.kernels.cpu_dsl import Module
from flexattn.lower.llvm_math import Math

MORE_ULPS = {("sigmoid", "float"): 0.3, ("sigmoid", "double"): 0.3, ("tanh", "float"): 4,
             ("tanh", "double"): 0.3}
UNARY = ("exp", "exp2", "expm1", "tanh", "sigmoid", "log", "log2", "log1p", "sin", "cos", "erf")
BINARY = ("pow", "fmod")
REAL = {"float": np.float32, "double": np.float64}
ULPS = {"float": 2.0, "double": 4.0}
RANGES = {"exp": (-104, 88.7), "exp2": (-149, 128), "expm1": (-30, 88), "tanh": (-12, 12),
          "sigmoid": (-80, 40), "log": (1e-30, 1e30), "log2": (1e-30, 1e30),
          "log1p": (-0.999, 1e6), "sin": (-1e5, 1e5), "cos": (-1e5, 1e5), "erf": (-7, 7)}
EXACT: dict[str, Callable] = {
    "exp": mpmath.exp, "exp2": lambda x: mpmath.mpf(2) ** x, "expm1": mpmath.expm1,
    "tanh": mpmath.tanh, "sigmoid": lambda x: 1 / (1 + mpmath.exp(-x)), "log": mpmath.log,
    "log2": lambda x: mpmath.log(x, 2), "log1p": mpmath.log1p, "sin": mpmath.sin,
    "cos": mpmath.cos, "erf": mpmath.erf, "pow": mpmath.power}


@cache
def compiled(real: str) -> objects.Library:
    """Every function as `name(x, y, out, n)` over n numbers, n a multiple of the lanes."""
    module = Module(objects.host().vector_bits, {"float": "float32", "double": "float64"}[real])
    for name in UNARY + BINARY:
        e = module.function(name, ("ptr", "ptr", "ptr", "i64"), export=True)
        x, y, out, n = e.params
        with e.loop(0, n, e.lanes) as loop:
            args = [e.load(p, e.vector, loop.index) for p in (x, y)]
            result = getattr(Math(e, e.lanes, real), name)(*args[:1 if name in UNARY else 2])
            e.store(result, out, loop.index)
        e.ret()
    return objects.library(f"test_llvm_math {real} {module}", lambda: str(module), UNARY + BINARY)


def run(name: str, real: str, *args: np.ndarray) -> np.ndarray:
    size = args[0].size
    padded = [np.resize(a.astype(REAL[real]), (size + 15) // 16 * 16) for a in args]
    out = np.empty_like(padded[0])
    pointers = [a.ctypes.data for a in (padded[0], padded[-1], out)]
    compiled(real).function(name, *[ctypes.c_void_p] * 3, ctypes.c_long)(*pointers, out.size)
    return out[:size]


def inputs(name: str, real: str, count: int, rng: np.random.Generator) -> np.ndarray:
    low, high = RANGES[name]
    if low > 0:
        values = np.exp(rng.uniform(math.log(low), math.log(high), count))
    else:
        values = rng.uniform(low, high, count)
    near_zero = rng.choice([-1, 1], count) * np.exp(rng.uniform(-30, 0.5, count))
    chosen = np.where(rng.random(count) < 0.5, values, np.clip(near_zero, low, high))
    return chosen.astype(REAL[real])


def worst_ulps(got: np.ndarray, exact: list, real: str) -> float:
    """Largest error in units of the last place of the exact result, denormals included."""
    kind, digits = REAL[real], {"float": 24, "double": 53}[real]
    worst = 0.0
    for value, true in zip(got.tolist(), exact, strict=True):
        least = float(np.finfo(kind).smallest_subnormal)
        unit = mpmath.ldexp(1, mpmath.frexp(true)[1] - digits) if true else least
        worst = max(worst, float(abs(mpmath.mpf(value) - true) / max(unit, least)))
    return worst


@pytest.mark.parametrize("real", REAL)
@pytest.mark.parametrize("name", UNARY)
def test_accuracy(name: str, real: str, rng: np.random.Generator) -> None:
    x = inputs(name, real, 4000, rng)
    with mpmath.workdps(40):
        exact = [EXACT[name](mpmath.mpf(v)) for v in x.tolist()]
        allowed = ULPS[real] + MORE_ULPS.get((name, real), 0)
        assert worst_ulps(run(name, real, x), exact, real) <= allowed


@pytest.mark.parametrize("real", REAL)
def test_pow_accuracy(real: str, rng: np.random.Generator) -> None:
    x = np.exp(rng.uniform(-20, 20, 4000)).astype(REAL[real])
    y = (rng.uniform(-1, 1, 4000) * (80 if real == "float" else 700)
         / np.maximum(np.abs(np.log(x.astype(np.float64))), 1)).astype(REAL[real])
    with mpmath.workdps(40):
        exact = [mpmath.power(mpmath.mpf(a), mpmath.mpf(b))
                 for a, b in zip(x.tolist(), y.tolist(), strict=True)]
        assert worst_ulps(run("pow", real, x, y), exact, real) <= ULPS[real]


@pytest.mark.parametrize("real", REAL)
def test_fmod_is_exact(real: str, rng: np.random.Generator) -> None:
    x = rng.normal(0, 1e4, 4000).astype(REAL[real])
    y = (rng.choice([-1, 1], 4000) * np.exp(rng.uniform(-3, 6, 4000))).astype(REAL[real])
    y[:100] = np.round(y[:100]) + (np.round(y[:100]) == 0)
    x[:100] = np.round(x[:100])
    np.testing.assert_array_equal(run("fmod", real, x, y), np.fmod(x, y))


SPECIALS = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e30, -1e30, 1e-40, -1e-40, 0.5,
            2.0, -2.0, 3.0, -3.0, -0.5]
NUMPY = {"exp": np.exp, "exp2": np.exp2, "expm1": np.expm1, "tanh": np.tanh,
         "sigmoid": lambda x: 1 / (1 + np.exp(-x)), "log": np.log, "log2": np.log2,
         "log1p": np.log1p, "erf": np.vectorize(math.erf), "fmod": np.fmod, "pow": np.power}


@pytest.mark.parametrize("real", REAL)
@pytest.mark.parametrize("name", [n for n in UNARY if n not in ("sin", "cos")])
def test_special_values(name: str, real: str) -> None:
    x = np.array(SPECIALS, REAL[real])
    with np.errstate(all="ignore"):
        expected = NUMPY[name](x).astype(REAL[real])
    np.testing.assert_allclose(run(name, real, x), expected, rtol=1e-6, atol=1e-44)


@pytest.mark.parametrize("real", REAL)
@pytest.mark.parametrize("name", BINARY)
def test_special_pairs(name: str, real: str) -> None:
    x, y = (g.ravel() for g in np.meshgrid(np.array(SPECIALS, REAL[real]),
                                           np.array(SPECIALS, REAL[real])))
    with np.errstate(all="ignore"):
        keep = (name == "pow") | (np.abs(x / y) < 1e15) | ~np.isfinite(x)
        expected = NUMPY[name](x, y)[keep]
    np.testing.assert_allclose(run(name, real, x, y)[keep], expected, rtol=1e-5, atol=1e-44)


@pytest.mark.parametrize("real", REAL)
@pytest.mark.parametrize("name", ["sin", "cos"])
def test_sine_is_bounded_everywhere(name: str, real: str, rng: np.random.Generator) -> None:
    huge = (rng.choice([-1, 1], 1000) * np.exp(rng.uniform(20, 80, 1000))).astype(REAL[real])
    assert np.abs(run(name, real, huge)).max() <= 1
    assert np.isnan(run(name, real, np.array([math.inf, -math.inf, math.nan]))).all()
    exact = [getattr(math, name)(v) for v in huge.tolist() if abs(v) < 1e9]
    got = run(name, real, np.array([v for v in huge.tolist() if abs(v) < 1e9]))
    np.testing.assert_allclose(got, exact, atol=1e-6 if real == "float" else 1e-15)
