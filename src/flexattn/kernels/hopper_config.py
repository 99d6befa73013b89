"""What Hopper's forward kernel is compiled for, and its tiles: what to change when tuning.

In: the columns of a head, and what its mod needs. Out: configs in the order of preference; a
launcher takes the first that fits the shared memory and spills nothing. Rejects (None): heads that
the kernel does not serve.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ForwardConfig:
    """What a kernel is compiled for.

    consumers: warpgroups, of 64 queries each. q_stages: buffers of queries, 2 where the next tile's
    come while this one's are used. ctas: how many share a multiprocessor, so that the products of
    one lie over the start and the end of another's tile. head_chunks x head_chunk columns of q and
    k, value_dim columns of v: what TMA fills, with zeros beyond the tensor's. fold_scale: the
    (positive) scale is part of the exponent's factor: there is no score mod, or a line over the
    keys.
    """

    consumers: int
    head_chunks: int
    head_chunk: int
    value_dim: int
    tile_kv: int
    stages: int
    fold_scale: bool = True
    q_stages: int = 1
    ctas: int = 1

    @property
    def q_registers(self) -> bool:
        """Whether queries are held in registers, and their buffer given back at once."""
        return self.consumers == 1

    @property
    def tile_q(self) -> int:
        return 64 * self.consumers

    @property
    def release_threads(self) -> int:
        """Of the barriers at which the consumers give a buffer back to the producer."""
        return 128 * self.consumers + 32

    @property
    def entry_registers(self) -> int:
        """Registers per thread at the start; then the producer gives its own away."""
        return _REGISTERS[self.consumers, self.ctas][0]

    @property
    def consumer_registers(self) -> int:
        return _REGISTERS[self.consumers, self.ctas][1]

    @property
    def producer_registers(self) -> int:
        return _REGISTERS[self.consumers, self.ctas][2]


# (consumers, ctas) -> registers at entry, of a consumer and of the producer. A multiprocessor
# has 65536; at entry the producer's warp takes as many as a warpgroup.
_REGISTERS = {(3, 1): (128, 160, 32), (2, 1): (168, 240, 24), (1, 2): (128, 232, 24),
              (1, 3): (80, 136, 24)}

# (head_chunks, head_chunk, value_dim) -> (consumers, tile_kv, stages, q_stages) by preference.
# Tensor cores multiply by powers of two of values' columns; 96 and 192 columns of q and k are three
# chunks.
_TILES: dict[tuple[int, int, int], tuple[tuple[int, int, int, int], ...]] = {
    (1, 64, 64): ((3, 128, 3, 2), (2, 128, 3, 2), (2, 64, 3, 2)),
    (3, 32, 128): ((2, 128, 2, 2), (2, 64, 3, 2)),
    (1, 128, 128): ((2, 128, 2, 2), (2, 64, 3, 2)),
    (3, 64, 128): ((2, 128, 2, 1), (2, 64, 3, 1)),
    (1, 256, 256): ((2, 64, 2, 1),),
}

# The same for rows of few blocks -> (ctas, tile_kv, stages), of one consumer.
_SHORT_ROWS: dict[tuple[int, int, int], tuple[tuple[int, int, int], ...]] = {
    (1, 64, 64): ((3, 64, 3),),
    (1, 128, 128): ((2, 64, 3),),
}


def forward_configs(head_dim: int, value_dim: int, fold_scale: bool, crowded: bool = False,
                    short_rows: bool = False) -> tuple[ForwardConfig, ...]:
    """Configs for heads of these sizes; none where the kernel does not serve them. crowded: the
    mod needs more registers than three consumers leave it. short_rows: of few blocks."""
    for heads, tiles in _TILES.items():
        chunks, chunk, values = heads
        if chunks * chunk >= head_dim and values >= value_dim:
            short = _SHORT_ROWS.get(heads, ()) if short_rows else ()
            return (*(ForwardConfig(1, *heads, tile_kv, stages, fold_scale, 1, ctas)
                      for ctas, tile_kv, stages in short),
                    *(ForwardConfig(consumers, *heads, tile_kv, stages, fold_scale, q_stages)
                      for consumers, tile_kv, stages, q_stages in tiles
                      if consumers < 3 or not crowded))
    return ()
