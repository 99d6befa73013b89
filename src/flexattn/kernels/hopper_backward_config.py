"""What Hopper's backward kernel is compiled for, and its tiles: what to change when tuning.

In: the columns of a head. Out: configs in the order of preference; a launcher takes the first that
spills little. Rejects (none): heads that the kernel does not serve.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HopperBackwardConfig:
    """What a kernel is compiled for.

    head_dim: columns of q, k, v and the gradient of the output. tile_q: queries of a step. stages:
    tiles of queries in shared memory. halves: how the two consumers share dq of a step, by
    "columns", by "rows", or by "keys": each adds what its own keys contribute. reads_queries: mods
    read captured tensors for each query. resident: a CTA takes tile after tile of keys, and stores
    dk and dv of one while it begins with the next (not measured yet).
    """

    head_dim: int
    tile_q: int
    stages: int
    halves: str
    reads_queries: bool = False
    resident: bool = False

    tile_kv = 128  # 64 for each consumer
    entry_registers = 168  # per thread at the start; then producer and reducer give theirs away
    consumer_registers = 240
    producer_registers = 24

    @property
    def column_step(self) -> int:
        """How far the consumers' columns of dq are apart."""
        return 64 if self.halves == "columns" else 0

    @property
    def row_step(self) -> int:
        """How far their rows are apart."""
        return 64 if self.halves == "rows" else 0


# Registers: dk and dv take head_dim / 2 each, scores and their gradient tile_q / 2 each, of 240.
_CONFIGS: dict[int, tuple[HopperBackwardConfig, ...]] = {
    64: (HopperBackwardConfig(64, 128, 2, "rows"), HopperBackwardConfig(64, 64, 2, "keys")),
    128: (HopperBackwardConfig(128, 64, 2, "columns"),),
}


def backward_configs(head_dim: int, value_dim: int,
                     crowded: bool = False) -> tuple[HopperBackwardConfig, ...]:
    """Configs for heads of these sizes. crowded: the mod is known to need many registers."""
    if value_dim != head_dim:
        return ()
    found = _CONFIGS.get(head_dim, ())
    return found[::-1] if crowded else found
