import torch

from flexattn.pictures import block_cells, element_cells, text
from tests.pictures.runs import EMPTY, FULL, PARTIAL, causal_runs, runs_of


def test_elements_of_a_tiny_mask():
    drawn = text(element_cells(torch.ones(3, 3).tril().bool()), "causal").splitlines()
    assert drawn == ["causal", "██····", "████··", "██████", "██ attended  ·· masked"]


def test_blocks():
    table = [[FULL, PARTIAL, EMPTY], [EMPTY, FULL, PARTIAL]]
    drawn = text(block_cells(runs_of([[table]], 16, 16), 32, 40)).splitlines()
    assert drawn == ["██▒▒··", "··██▒▒", "██ full  ▒▒ partial  ·· empty"]


def test_groups_of_blocks_are_shaded_by_what_is_attended():
    table = [[FULL, FULL, PARTIAL, EMPTY, EMPTY, EMPTY, FULL, PARTIAL]] * 2
    drawn = text(block_cells(runs_of([[table]], 16, 16), 32, 128, limit=(4, 4))).splitlines()
    assert drawn[0] == "██░░··▓▓"
    assert "16 x 32 tokens per cell" in drawn[-1]


def test_a_million_tokens_fit_a_terminal():
    cells = block_cells(causal_runs(1 << 20, 128), 1 << 20, 1 << 20, limit=(20, 20))
    drawn = text(cells).splitlines()
    assert len(drawn) <= 21 and max(map(len, drawn[:-1])) <= 40
