"""Fresh random inputs for every run; FLEXATTN_TEST_SEED=<n> repeats one."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from flexattn import compile


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true",
                     help="write the golden texts of generated code anew")


@pytest.fixture
def seed() -> int:
    """A new seed each time; pytest shows it with a failing test's output."""
    value = int(os.environ.get("FLEXATTN_TEST_SEED") or secrets.randbits(32))
    print(f"FLEXATTN_TEST_SEED={value}")
    return value


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    """numpy's generator for this test; torch's global one is seeded alike."""
    torch.manual_seed(seed)
    return np.random.default_rng(seed)


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiled kernels of the tests stay out of the user's cache. FLEXATTN_TEST_CACHE: a folder
    that runs share, for those after the first."""
    given = os.environ.get("FLEXATTN_TEST_CACHE")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEXATTN_CACHE_DIR", given or str(tmp_path_factory.mktemp("cache")))
        compile.cache_directory.cache_clear()
        yield
    compile.cache_directory.cache_clear()


@pytest.fixture
def no_number_has_varied(monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of other tests' mods may have: they would be arguments here, not constants."""
    monkeypatch.setattr("flexattn.trace.tracer._skeletons", {})


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
