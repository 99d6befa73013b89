"""Pictures of masks: text, SVG and matplotlib, all of the same grid of cells; of scores: SVG.

BlockMask has them as the methods of `Pictures`.
"""

from flexattn.pictures.cells import Cells, block_cells, element_cells
from flexattn.pictures.methods import Pictures
from flexattn.pictures.plot import plot
from flexattn.pictures.svg import score_svg, svg
from flexattn.pictures.text import text

__all__ = ["Cells", "Pictures", "block_cells", "element_cells", "plot", "score_svg", "svg", "text"]
