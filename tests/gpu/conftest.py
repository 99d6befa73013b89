"""What needs a GPU. Without one every test here is skipped.

    pytest tests/gpu                            all kernels, as calls choose them
    pytest tests/gpu --gpu-kernel "triton"      one kernel of launch_gpu.FORWARD; calls that it
                                                refuses are skipped
    pytest tests/gpu --gpu-backward "hopper"    the same of launch_gpu.BACKWARD
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from flexattn import compile
from flexattn.errors import DeviceError
from flexattn.runtime import launch_gpu
from tests.gpu.pairs import Case, warm

_OPTIONS = {"--gpu-kernel": "FORWARD", "--gpu-backward": "BACKWARD"}
_WORKERS = min(14, (os.cpu_count() or 2) - 1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-kernel", default="", help="the only forward kernel to test")
    parser.addoption("--gpu-backward", default="", help="the only backward kernel to test")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session", autouse=True)
def only_kernel(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for option, table in _OPTIONS.items():
            name = request.config.getoption(option, "")
            if name:
                kernels = getattr(launch_gpu, table)
                patch.setattr(launch_gpu, table, {name: kernels[name]})
        yield


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A kernel tested alone may refuse."""
    outcome = yield
    error = outcome.excinfo  # type: ignore[attr-defined]
    alone = any(item.config.getoption(option, "") for option in _OPTIONS)
    if error and alone and isinstance(error[1], DeviceError) \
            and "No GPU kernel takes this call" in str(error[1]):
        pytest.skip(str(error[1]).splitlines()[-1])


@pytest.fixture(scope="session")
def warmed(private_cache: None, request: pytest.FixtureRequest) -> None:
    """The kernels of the selected cases, compiled into the cache by many processes at once."""
    cases = [item.callspec.params["case"] for item in request.session.items
             if "case" in getattr(getattr(item, "callspec", None), "params", {})]
    found: list[Case] = [case for case in cases if isinstance(case, Case)]
    if len(found) < 3 or "PYTEST_XDIST_WORKER" in os.environ:
        return
    environment = {"FLEXATTN_CACHE_DIR": str(compile.cache_directory())}
    with ProcessPoolExecutor(_WORKERS, get_context("spawn")) as pool:
        list(pool.map(warm, found, [environment] * len(found)))
