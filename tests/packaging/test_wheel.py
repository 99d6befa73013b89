"""The wheel and the sdist: they build, hold what they should, and the wheel works alone."""

from __future__ import annotations

import email
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "flexattn"
OPTIONAL = ("matplotlib", "numba", "rich", "tqdm", "transformers", "triton", "typer")

ATTEND = """
import torch, flexattn
from flexattn.masks import causal
q, k, v = (torch.randn(1, 2, 200, 32, requires_grad=True) for _ in range(3))
mask = flexattn.create_block_mask(causal, None, None, 200, 200)
out = flexattn.flex_attention(q, k, v, block_mask=mask)
wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
torch.testing.assert_close(out, wanted)
for got, want in zip(*(torch.autograd.grad(o.sum(), (q, k, v)) for o in (out, wanted))):
    torch.testing.assert_close(got, want)
"""


def build(kind: str, tree: Path, out: Path) -> Path:
    """The wheel or sdist of a source tree, by the backend that pyproject.toml names."""
    out.mkdir(exist_ok=True)
    code = f"from setuptools.build_meta import build_{kind}; build_{kind}({str(out)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=tree, check=True, capture_output=True)
    made, = out.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return made


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a copy of the tracked files, so that nothing is left in this checkout."""
    tree = tmp_path_factory.mktemp("tree")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True)
    for name in filter(None, names.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    return build("sdist", tree, tree / "dist")


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the unpacked sdist, as installers do."""
    tree = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(tree, filter="data")
    unpacked, = tree.iterdir()
    return build("wheel", unpacked, tree / "dist")


def test_the_sdist_holds_sources_and_licence(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "src/flexattn/py.typed"} <= names


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert names == {p.relative_to(SOURCE.parent).as_posix() for p in SOURCE.rglob("*")
                     if p.suffix == ".py" or p.name == "py.typed"}
    assert wheel.name.endswith("-py3-none-any.whl")


def dist_info(wheel: Path, name: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        path, = (n for n in archive.namelist() if n.endswith(f".dist-info/{name}"))
        return archive.read(path).decode()


def test_only_torch_numpy_and_llvmlite_are_required(wheel: Path) -> None:
    metadata = email.message_from_string(dist_info(wheel, "METADATA"))
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert {re.split(r"[<>=! ]", line)[0] for line in required} == {"torch", "numpy", "llvmlite"}
    assert {"cli", "demo", "dev", "docs", "plot", "transformers"} <= set(
        metadata.get_all("Provides-Extra", []))
    assert "flexattn = flexattn.cli:main" in dist_info(wheel, "entry_points.txt")


def test_the_wheel_works_with_required_packages_alone(wheel: Path, tmp_path: Path) -> None:
    """Installed apart; every optional package is hidden."""
    site = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index",
                    "--target", str(site), str(wheel)], check=True, capture_output=True)
    code = (f"import sys; sys.path.insert(0, {str(site)!r})\n"
            f"sys.modules.update(dict.fromkeys({OPTIONAL!r}))\n{ATTEND}\n"
            f"assert flexattn.__file__.startswith({str(site)!r}), flexattn.__file__\n"
            "import flexattn.integrations.transformers, flexattn.pictures, flexattn.masks\n"
            "print(flexattn.explain(q, q, q, lambda score, b, h, i, j: score * 2))")
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                            text=True)
    assert result.returncode == 0, result.stderr
    assert "return score" in result.stdout
