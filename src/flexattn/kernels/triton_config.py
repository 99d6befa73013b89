"""Tile sizes of the Triton kernels: what to change when tuning for another GPU.

In: the backend, its architecture, the shape of a head and how wide its numbers are. Out: configs
in the order of preference; a launcher takes the first that fits the GPU's shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TritonConfig:
    """A tile, and Triton's options for its kernel."""

    tile_q: int
    tile_kv: int
    warps: int
    stages: int


@dataclass(frozen=True)
class ForwardFacts:
    """What a forward kernel is compiled for. fold: no score mod, and scale > 0. rounded: float32
    is rounded to tf32 before it is multiplied."""

    head_dim: int
    value_dim: int
    head_chunk: int
    value_chunk: int
    tile_q: int
    tile_kv: int
    sparse: bool = False
    fold: bool = True
    precision: str = "tf32"
    rounded: bool = False

    @property
    def value_chunks(self) -> int:
        return -(-self.value_dim // self.value_chunk)


@dataclass(frozen=True)
class BackwardFacts:
    """What a backward kernel is compiled for.

    The reads of captured tensors that need a gradient go by their number: read i has the result
    d_load<i> of score_mod_grad. A read whose index does not depend on kv_idx is in row_sums: its
    gradient is summed over a row before the index matters; col_sums likewise; diagonals: the index
    depends on q_idx - kv_idx only; scattered: any other. exact: no sum depends on the order of
    atomic additions.
    """

    head_dim: int
    value_dim: int
    head_chunk: int
    value_chunk: int
    tile_q: int
    tile_kv: int
    sparse: bool = False
    precision: str = "tf32"
    rounded: bool = False
    row_sums: tuple[int, ...] = ()
    col_sums: tuple[int, ...] = ()
    diagonals: tuple[int, ...] = ()
    scattered: tuple[int, ...] = ()
    exact: bool = False

    @property
    def head_chunks(self) -> int:
        return -(-self.head_dim // self.head_chunk)

    @property
    def value_chunks(self) -> int:
        return -(-self.value_dim // self.value_chunk)

    @property
    def unordered(self) -> tuple[int, ...]:
        """Reads whose gradient is summed by atomic additions."""
        return self.diagonals + self.scattered


def power_of_two(size: int) -> int:
    """The least one that is not smaller."""
    return 1 << max(size - 1, 0).bit_length()


def chunk_of(dim: int) -> int:
    """Columns of the chunks that a head of `dim` columns is held in: powers of two, with as few
    columns beyond the head as chunks of 16 would have, or up to an eighth more."""
    padded = -(-dim // 16) * 16
    sizes = [size for size in (512, 256, 128, 64, 32, 16)
             if -(-dim // size) * size <= padded + padded // 8]
    return sizes[0]


# Widest of head_dim and value_dim (in 16-bit columns) -> configs. Hopper and Blackwell's datacentre
# GPUs have 227 KiB of shared memory for a program, A100 163, consumer GPUs 99, CDNA3 64.
_FORWARD: dict[int, tuple[TritonConfig, ...]] = {
    64: (TritonConfig(64, 64, 4, 3), TritonConfig(64, 64, 4, 2)),
    128: (TritonConfig(64, 64, 4, 3), TritonConfig(64, 64, 4, 2), TritonConfig(64, 32, 4, 2)),
    256: (TritonConfig(128, 64, 8, 2), TritonConfig(64, 64, 4, 2), TritonConfig(64, 32, 4, 2),
          TritonConfig(32, 32, 4, 1)),
    512: (TritonConfig(64, 32, 8, 2), TritonConfig(64, 32, 8, 1), TritonConfig(32, 32, 4, 1),
          TritonConfig(16, 16, 4, 1)),
    1 << 30: (TritonConfig(64, 32, 8, 2), TritonConfig(64, 32, 8, 1), TritonConfig(32, 32, 4, 1),
              TritonConfig(16, 32, 4, 1), TritonConfig(16, 16, 4, 1)),
}
_FORWARD_SPARSE = {64: TritonConfig(128, 64, 4, 3)}  # better with a block mask


def _exact_config(head_dim: int, value_dim: int) -> TritonConfig:
    """float32 without tensor cores: a thread multiplies numbers of its own registers."""
    width = max(head_dim, value_dim)
    return TritonConfig(32, 32, 8, 1) if width <= 128 else TritonConfig(16, 16, 8, 1)


def forward_configs(backend: str, arch: int | str, head_dim: int, value_dim: int,
                    bytes_each: int, exact: bool = False,
                    sparse: bool = False) -> tuple[TritonConfig, ...]:
    """Configs of the forward kernel. exact: float32 products are not rounded to tf32. sparse:
    with a block mask."""
    if exact:
        return (_exact_config(head_dim, value_dim),)
    width = max(head_dim, value_dim) * bytes_each // 2
    most, found = next(item for item in _FORWARD.items() if width <= item[0])
    if sparse and most in _FORWARD_SPARSE:
        found = (_FORWARD_SPARSE[most], *found)
    if backend == "hip" or (isinstance(arch, int) and arch not in (80, 90, 100, 103)):
        return tuple(c for c in found if c.stages < 3) or found
    return found


# Of the kernel of dk and dv, and of the kernel of dq.
_Choices = tuple[tuple[TritonConfig, ...], tuple[TritonConfig, ...]]
_BACKWARD: dict[int, _Choices] = {
    64: ((TritonConfig(64, 64, 4, 3), TritonConfig(64, 64, 4, 2), TritonConfig(32, 64, 4, 1)),
         (TritonConfig(64, 64, 4, 3), TritonConfig(64, 64, 4, 2), TritonConfig(64, 32, 4, 1))),
    128: ((TritonConfig(32, 128, 8, 3), TritonConfig(32, 128, 8, 2), TritonConfig(32, 64, 4, 2),
           TritonConfig(32, 32, 4, 1)),
          (TritonConfig(128, 64, 8, 3), TritonConfig(128, 32, 8, 2), TritonConfig(64, 32, 4, 2),
           TritonConfig(32, 32, 4, 1))),
    256: ((TritonConfig(64, 64, 8, 1), TritonConfig(32, 64, 8, 1), TritonConfig(32, 32, 4, 1),
           TritonConfig(16, 16, 4, 1)),
          (TritonConfig(64, 64, 8, 1), TritonConfig(64, 32, 8, 1), TritonConfig(32, 32, 4, 1),
           TritonConfig(16, 16, 4, 1))),
    1 << 30: ((TritonConfig(32, 32, 8, 1), TritonConfig(16, 32, 4, 1), TritonConfig(16, 16, 4, 1)),
              (TritonConfig(32, 32, 8, 1), TritonConfig(32, 16, 4, 1), TritonConfig(16, 16, 4, 1))),
}
# Where tiles come by TMA (Hopper and later), which leaves more registers.
_BACKWARD_TMA: dict[int, _Choices] = {
    64: ((TritonConfig(128, 64, 4, 2), TritonConfig(64, 64, 4, 3)), (TritonConfig(64, 64, 4, 3),)),
    128: ((TritonConfig(64, 64, 4, 2), TritonConfig(64, 128, 8, 3)),
          (TritonConfig(64, 64, 4, 2), TritonConfig(128, 64, 8, 3))),
    256: ((TritonConfig(64, 64, 8, 2), TritonConfig(32, 64, 8, 2)),
          (TritonConfig(64, 64, 8, 2), TritonConfig(64, 32, 8, 2))),
}


def backward_configs(head_dim: int, value_dim: int, bytes_each: int, exact: bool = False,
                     boxed: bool = False) -> _Choices:
    """Configs of the kernel of dk and dv, and of the kernel of dq. boxed: tiles come by TMA."""
    if exact:
        config = _exact_config(head_dim, value_dim)
        return (config,), (config,)
    width = max(head_dim, value_dim) * bytes_each // 2
    most, found = next(item for item in _BACKWARD.items() if width <= item[0])
    first = _BACKWARD_TMA.get(most, ((), ())) if boxed else ((), ())
    return first[0] + found[0], first[1] + found[1]


@dataclass(frozen=True)
class BlockFacts:
    """What the kernel of block kinds is compiled for: block sizes, blocks of a program, and the
    elements of one block that it evaluates at once."""

    q_block: int
    kv_block: int
    chunk: int
    part_q: int = 16
    part_kv: int = 128
