"""One of two ranks on a CPU (gloo): python ranks.py <ddp|fsdp> <rank> <port>.

Trains a small model a step under DDP or FSDP2, eagerly and compiled, and compares its gradients
with those of one process that sees both ranks' batches.
"""

import sys

import torch
import torch.distributed as dist
from torch import nn

from flexattn import create_block_mask, flex_attention, masks


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 3 * 32)
        self.bias = nn.Parameter(torch.randn(2, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, 2, 16).permute(2, 0, 3, 1, 4)
        mask = create_block_mask(masks.causal, None, None, length, length, BLOCK_SIZE=16)
        out = flex_attention(q, k, v, lambda s, b, h, i, j: s + self.bias[h, i - j], mask)
        return x + out.transpose(1, 2).reshape(batch, length, 32)


def wrapped(kind: str, model: nn.Module) -> nn.Module:
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def main(kind: str, rank: int, port: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    state, batches = Layer().state_dict(), torch.randn(2, 3, 24, 32)
    alone = Layer()
    alone.load_state_dict(state)
    (alone(batches.flatten(0, 1)).square().sum() / 2).backward()
    for compiled in (False, True):
        model = Layer()
        model.load_state_dict(state)
        parallel = wrapped(kind, model)
        step = torch.compile(parallel, backend="aot_eager") if compiled else parallel
        step(batches[rank]).square().sum().backward()
        for got, expected in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(whole(got.grad), expected.grad, rtol=1e-4, atol=1e-4)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
