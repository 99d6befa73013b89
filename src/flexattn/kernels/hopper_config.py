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
    come while this one's are used. head_chunks x head_chunk columns of q and k,
    value_dim columns of v: what TMA fills, with zeros beyond the tensor's. fold_scale: the
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
        return 168 if self.consumers == 2 else 128

    @property
    def consumer_registers(self) -> int:
        return 240 if self.consumers == 2 else 160

    @property
    def producer_registers(self) -> int:
        return 24 if self.consumers == 2 else 32


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


def forward_configs(head_dim: int, value_dim: int, fold_scale: bool,
                    crowded: bool = False) -> tuple[ForwardConfig, ...]:
    """Configs for heads of these sizes; none where the kernel does not serve them. crowded: the
    mod needs more registers than three consumers leave it."""
    for (chunks, chunk, values), tiles in _TILES.items():
        if chunks * chunk >= head_dim and values >= value_dim:
            return tuple(ForwardConfig(consumers, chunks, chunk, values, tile_kv, stages,
                                       fold_scale, q_stages)
                         for consumers, tile_kv, stages, q_stages in tiles
                         if consumers < 3 or not crowded)
    return ()
