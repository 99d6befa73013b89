"""Tables of runs with a given bound, for which nothing waits on a GPU.

In: a traced mask, its grid, a device, a bound. Out: a RunTable with room for so many runs. Rejects
(ArgumentError): more runs than that, and masks that the device has no such way of making.
"""

from __future__ import annotations

import torch

from flexattn.analysis.block_sparsity import SOLVERS, mask_runs
from flexattn.analysis.runs import RunTable, all_partial, transposed
from flexattn.analysis.undecided import Grid
from flexattn.errors import ArgumentError, message
from flexattn.trace import Mod

_MORE = 2  # runs of a table in other tiles: a partial one may become partial, full and partial


def bounded_runs(mod: Mod, grid: Grid, device: torch.device, room: int, separate: bool = True
                 ) -> RunTable:
    """The table by rows. Where a device reported that an earlier one had too little room, this
    raises it."""
    if device.type not in SOLVERS:
        table = mask_runs(mod, grid, device)
        return (table if separate else all_partial(table, grid.columns)).with_room(room)
    solver = SOLVERS[device.type]()
    solver.check(device)
    return _found(solver.runs(mod, grid, device, room, separate))


def bounded_columns(table: RunTable, columns: int) -> RunTable:
    """A table with room as rows of `columns` columns, with room of its own."""
    room = int(_MORE * len(table.start) * max(columns / max(table.num_rows, 1), 1.0)) + 1
    device = table.offsets.device
    if device.type not in SOLVERS:
        return transposed(table.exact(), columns).with_room(room)
    return _found(SOLVERS[device.type]().turned(table, columns, room))


def room_for(table: RunTable, tile_q: int, tile_kv: int) -> int:
    """Room for the same mask in tiles: no bound, but more generous than the table's own room; a
    lack of it is reported."""
    finer = -(-table.row_block // tile_q) * -(-table.col_block // tile_kv)
    return _MORE * len(table.start) * finer + 1


def _found(table: RunTable | str) -> RunTable:
    if isinstance(table, str):
        raise ArgumentError(message("max_runs: this mask cannot be made without waiting for the "
                                    "device.", got=table,
                                    remedy="create_block_mask without max_runs"))
    return table
