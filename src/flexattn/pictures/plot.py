"""A mask drawn with matplotlib, which is imported only here and only when asked for."""

from __future__ import annotations

from typing import Any

import numpy as np

from flexattn.errors import FlexAttnError, message
from flexattn.pictures.cells import Cells
from flexattn.pictures.style import FAINT, blend, caption, legend, ticks


class MatplotlibMissingError(FlexAttnError, ImportError):
    """matplotlib is needed, and not installed."""


def plot(cells: Cells, title: str = "block mask", ax: Any = None) -> Any:
    """The cells on `ax` (a new figure's where none is given); gives the Axes back.

    Errors: MatplotlibMissingError.
    """
    ax = _new_axes(cells) if ax is None else ax
    colors = np.array([[blend(f, p) for f, p in zip(*shares, strict=True)] for shares in
                       zip(cells.full.tolist(), cells.partial.tolist(), strict=True)])
    lines = len(cells.row_edges) < 65 and len(cells.col_edges) < 65
    ax.pcolormesh(cells.col_edges, cells.row_edges, colors.reshape(*cells.full.shape, 3),
                  edgecolors="white" if lines else "face", linewidth=0.6 if lines else 0)
    ax.set_xlim(0, cells.kv_len)
    ax.set_ylim(cells.q_len, 0)
    ax.set_aspect("equal")
    ax.set_xticks(*ticks(cells.kv_len, cells.blocks is None))
    ax.set_yticks(*ticks(cells.q_len, cells.blocks is None))
    ax.xaxis.tick_top()
    ax.xaxis.set_label_position("top")
    ax.set_xlabel("key / value")
    ax.set_ylabel("query")
    ax.set_title(f"{title}\n{caption(cells)}", fontsize="medium", loc="left")
    ax.tick_params(labelsize="small", color=FAINT)
    _add_legend(ax, cells)
    return ax


def _new_axes(cells: Cells) -> Any:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise MatplotlibMissingError(message(
            "plot() needs matplotlib", got=str(error),
            remedy="pip install 'flexattn[plot]'; notebooks show masks as SVG without it")
        ) from error
    return pyplot.subplots(figsize=(5, 5), layout="constrained")[1]


def _add_legend(ax: Any, cells: Cells) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(facecolor=color, edgecolor=FAINT, linewidth=0.5, label=meaning)
               for color, meaning in legend(cells)]
    ax.legend(handles=patches, loc="upper left", bbox_to_anchor=(0, -0.02), ncols=3,
              frameon=False, fontsize="small", borderaxespad=0)
