"""Tiles of the decoding kernel, and into how many splits it deals out the keys.

In: the backend, the shape of a head, how wide its numbers are, how many rows share keys. Out:
configs in the order of preference (a launcher takes the first that fits the GPU's shared memory),
and the number of splits. What to change when tuning for another GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from flexattn.kernels.triton_config import TritonConfig

SHORT = 16  # queries: always decoding
MOST_QUERIES = 64  # that a tile's row of mask blocks has; decoding where the GPU would idle
_ROWS = (16, 32, 64)
_OVERHEAD = 2  # of a program, in tiles of keys

# Widest of head_dim and value_dim (in 16-bit columns) -> tile_kv, warps, stages, each with two
# tiles of keys and values on their way. On an H100 the tiles up to 128 columns are within 3 % of
# each other; the first choice is the one that suffers least from a mod.
_TILES: dict[int, tuple[tuple[int, int, int], ...]] = {
    64: ((128, 4, 3), (64, 4, 3), (64, 4, 2)),
    128: ((128, 8, 3), (64, 4, 3), (64, 4, 2), (32, 4, 2)),
    256: ((32, 4, 3), (32, 4, 2), (16, 4, 2)),
    1 << 30: ((32, 8, 2), (16, 4, 2), (16, 4, 1)),
}


def decode_configs(backend: str, head_dim: int, value_dim: int, bytes_each: int,
                   rows: int) -> tuple[TritonConfig, ...]:
    """Configs for `rows` (head, query) pairs that share keys; tile_q is the rows of a tile."""
    width = max(head_dim, value_dim) * bytes_each // 2
    tile_q = next((n for n in _ROWS if rows <= n), _ROWS[-1])
    found = next(tiles for most, tiles in _TILES.items() if width <= most)
    return tuple(TritonConfig(tile_q, *tile) for tile in found
                 if backend != "hip" or tile[2] < 3)


@lru_cache(maxsize=4096)
def number_of_splits(lines: int, tiles: int, programs: int) -> int:
    """So that `lines` x splits programs, of which the GPU runs `programs` at a time, take the
    least time to go through `tiles` tiles of keys each."""
    def time(splits: int) -> int:
        return -(-lines * splits // programs) * (-(-tiles // splits) + _OVERHEAD)

    return min(_fewest(tiles, programs), key=time)


def _fewest(tiles: int, programs: int) -> Iterator[int]:
    """Numbers of splits, up to `programs`, such that with one less a split has more tiles."""
    splits = 1
    while splits <= max(1, min(tiles, programs)):
        yield splits
        each = -(-tiles // splits)
        splits = -(-tiles // (each - 1)) if each > 1 else tiles + 1
