"""What the parts of the CPU backward kernel share: its arguments, and one thread's scratch memory.

In: the dtype and head dimensions of a kernel and its tile. Out: where each argument and each
array of a tile lies.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from flexattn.kernels.cpu_dsl import byte_size
from flexattn.kernels.cpu_frame import Frame

ARGUMENTS = (
    # addresses
    "query", "key", "value", "out", "d_out", "lse", "d_lse", "d_query", "d_key", "d_value",
    "row_lse", "row_delta", "total_d_query", "scratch", "counters", "gradients",
    "score_captures", "score_numbers", "mask_captures", "mask_numbers", "score_fault",
    "mask_fault",
    "row_offsets", "row_start", "row_end", "row_full",
    "column_offsets", "column_start", "column_end", "column_full",
    # strides, in elements
    "query_b", "query_h", "query_s", "query_d", "key_b", "key_h", "key_s", "key_d",
    "value_b", "value_h", "value_s", "value_d", "out_b", "out_h", "out_s", "d_out_b", "d_out_h",
    "d_out_s", "total_b", "total_h", "total_unit",
    # sizes
    "batches", "kv_batches", "kv_heads", "group", "q_len", "kv_len", "scratch_bytes",
    "gradient_words",
    # block mask by rows: the row of runs of q_idx is b * rows_b + h * rows_h + q_idx / row_block,
    # it has row_tiles tiles of row_tile queries; by columns likewise
    "rows_b", "rows_h", "row_block", "row_other", "row_tiles", "row_tile",
    "columns_b", "columns_h", "column_block", "column_other", "column_tiles", "column_tile",
    # units of work, and lanes they are dealt to: lane i does units i, i + lanes, ...
    "column_units", "column_lanes", "columns_a_unit", "row_units", "row_lanes", "heads_a_unit",
    "prepare_units", "accumulate_by_columns", "accumulate_by_rows",
    # float64
    "scale",
)  # fmt: skip
PREPARED_ROWS = 64  # rows of one unit of preparation
COUNTER_WORDS = 8  # i64 words between counters, one cache line
PHASES = ("prepare", "by_columns", "by_rows")


@dataclass(frozen=True)
class BackwardFrame(Frame):
    """One thread's scratch memory.

    scores [tile_q][score_stride] become p, slopes (d p) become d s. query, d_out, d_query
    [tile_q][line] and keys, d_key, d_value [tile_kv][line] are lines in the type computed in;
    key_panels and value_panels are packed. first, last: columns of a panel of rows with an
    attended score; row_first, row_last: rows of a panel of columns.

    Where bfloat16 is multiplied in pairs, query and d_out [tile_q][row_words] are as they came,
    p becomes [tile_q / 2][score_stride] words of two rows, d s [tile_q][score_stride] words of two
    columns, and slope_pairs, query_pairs, d_out_pairs, keys are words of two rows.
    """

    @property
    def multiple(self) -> int:
        """Rows up to the next multiple are zero, for what `multiply` asks of a depth."""
        return 8 if self.pairs else 4

    def row_words(self, dim: int) -> int:
        """Words from one row of a left operand to the next."""
        return self.words(dim) + 16 if self.pairs else self.line(dim)

    @property
    def summed_over_rows(self) -> tuple[str, str, str, str]:
        """Where p, d_out, d s and query are, as operands of a product along rows."""
        if self.pairs:
            return "scores", "d_out_pairs", "slope_pairs", "query_pairs"
        return "scores", "d_out", "slopes", "query"

    def line(self, dim: int) -> int:
        """Elements from one line to the next: whole panels, and a cache line more so that lines
        do not fall on the same cache sets."""
        return -(-dim // self.columns) * self.columns + 64 // byte_size(self.real)

    @cached_property
    def _sizes(self) -> dict[str, int]:
        rows, keys, real = self.tile.tile_q, self.tile.tile_kv, byte_size(self.real)
        q_line, v_line = (self.line(dim) * real for dim in (self.head_dim, self.value_dim))
        paired = {"slope_pairs": rows // 2 * self.score_stride * real,
                  "query_pairs": rows // 2 * q_line, "d_out_pairs": rows // 2 * v_line}
        return {
            "scores": rows * self.score_stride * real,
            "slopes": rows * self.score_stride * real,
            "query": rows * self.row_words(self.head_dim) * real,
            "d_out": rows * self.row_words(self.value_dim) * real,
            **(paired if self.pairs else {}),
            "d_query": (rows + self.tile.rows) * q_line,
            "keys": keys * q_line,
            "key_panels": keys * self.depth(self.head_dim) * real,
            "value_panels": keys * self.depth(self.value_dim) * real,
            "d_key": keys * q_line,
            "d_value": keys * v_line,
            **dict.fromkeys(("first", "last"), rows * 8),
            **dict.fromkeys(("row_first", "row_last"), keys // self.columns * 8),
            "attended": rows * keys * 2,
            "columns": 0,
        }
