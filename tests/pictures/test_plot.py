import subprocess
import sys

import pytest
import torch

from flexattn.pictures import element_cells, plot
from flexattn.pictures.plot import MatplotlibMissingError
from flexattn.pictures.style import EMPTY, FULL


def test_matplotlib_is_imported_only_when_asked_for():
    code = "import sys, flexattn.pictures; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MatplotlibMissingError, match="flexattn\\[plot\\]"):
        plot(element_cells(torch.ones(2, 2)))


def test_axes_show_the_cells():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    attended = torch.rand(6, 9) < 0.5
    figure, ax = pyplot.subplots()
    assert plot(element_cells(attended), "random", ax) is ax
    colors = ax.collections[0].get_array().reshape(6, 9, 3)
    for i in range(6):
        for j in range(9):
            assert tuple(colors[i, j]) == pytest.approx(FULL if attended[i, j] else EMPTY)
    assert ax.get_ylim() == (6, 0) and ax.get_title(loc="left").startswith("random\n6 × 9 tokens")
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["attended", "masked"]
    pyplot.close(figure)
