"""Tile sizes of the kernels: what to change when tuning for another machine."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class CpuTile:
    """Tile of a CPU kernel.

    rows x vectors accumulators stay in registers (rows of A, vectors of B). tile_q rows of
    scores are tile_q // rows panels of `rows` and the rest in panels of `rest`; tile_kv columns
    and their keys and values fit the second-level cache. `pairs`: bfloat16 is multiplied as it is,
    two products to a lane (AVX-512's vdpbf16ps), and so are the probabilities.
    """

    vector_bits: int
    rows: int
    rest: int
    vectors: int
    tile_q: int
    tile_kv: int
    pairs: bool = False

    def columns(self, storage: str) -> int:
        """Columns of one packed panel."""
        return self.vectors * self.vector_bits // (64 if storage == "float64" else 32)


def cpu_tile(storage: str, head_dim: int, value_dim: int, vector_bits: int,
             pairs: bool = False) -> CpuTile:
    """16 registers: 6 x 2 accumulators, 32 registers (AVX-512, NEON): 12 x 2 or 6 x 4."""
    rows, vectors = {512: (12, 2), 256: (6, 2), 128: (6, 4)}[vector_bits]
    wide = max(head_dim, value_dim) * (2 if storage == "float64" else 1)
    tile_kv = 256 if wide <= 128 else 128 if wide <= 256 else 64
    return CpuTile(vector_bits, rows, 4, vectors, tile_q=64, tile_kv=tile_kv,
                   pairs=pairs and storage == "bfloat16")


def decode_tile(vector_bits: int) -> CpuTile:
    """Few queries, read one by one; keys and values of a tile fit the second-level cache."""
    return CpuTile(vector_bits, rows=1, rest=1, vectors=2, tile_q=16, tile_kv=256)


def cpu_backward_tile(storage: str, head_dim: int, value_dim: int, vector_bits: int,
                      pairs: bool = False) -> CpuTile:
    """Two tiles of scores, and lines of queries, keys and their gradients, share the cache."""
    forward = cpu_tile(storage, head_dim, value_dim, vector_bits, pairs)
    return replace(forward, tile_kv=128 if forward.tile_kv > 64 else 64)
