"""Three ways to write down documents packed one after the other, and the ways between them.

lengths [3, 1, 2]  <->  offsets [0, 3, 4, 6] (cu_seqlens)  <->  ids [0, 0, 0, 1, 2, 2]

All are integer tensors of rank 1; results are int64 on the device of the input. Document lengths
may be 0: such a document has no token, so ids alone cannot tell of it when it is the last.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flexattn.errors import ArgumentError, message
from flexattn.masks.arguments import index_tensor, integer


def lengths_to_offsets(lengths: Tensor | Sequence[int]) -> Tensor:
    """Where each document starts, and the total at the end: [0, l0, l0 + l1, ...]."""
    lengths = _lengths(lengths)
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def lengths_to_ids(lengths: Tensor | Sequence[int], total: int | None = None) -> Tensor:
    """The document of each token.

    total: pad to this many tokens with -1 (padding is then a document of its own; mask it with
    `padding(sum(lengths))` where it must not attend itself).

    Errors: ArgumentError if the documents are longer than `total`.
    """
    lengths = _lengths(lengths)
    ids = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    if total is None:
        return ids
    if len(ids) > integer("total", total):
        raise ArgumentError(message("the documents do not fit", expected=f"at most {total} tokens",
                                    got=f"{len(ids)} tokens in {len(lengths)} documents"))
    return torch.cat([ids, ids.new_full((total - len(ids),), -1)])


def offsets_to_lengths(offsets: Tensor) -> Tensor:
    """The length of each document."""
    return index_tensor("offsets", offsets, "[num_documents + 1]").long().diff()


def offsets_to_ids(offsets: Tensor, total: int | None = None) -> Tensor:
    """The document of each token; `total` as in `lengths_to_ids`."""
    return lengths_to_ids(offsets_to_lengths(offsets), total)


def ids_to_lengths(document_id: Tensor) -> Tensor:
    """The length of each run of equal ids: the documents in the order they are packed in."""
    document_id = index_tensor("document_id", document_id, "[S]")
    return torch.unique_consecutive(document_id, return_counts=True)[1]


def ids_to_offsets(document_id: Tensor) -> Tensor:
    """Where each run of equal ids starts, and the total at the end."""
    return lengths_to_offsets(ids_to_lengths(document_id))


def document_starts(document_id: Tensor) -> Tensor:
    """The position where each token's document starts; [S] or [B, S] like `document_id`.

    A document is a run of equal ids: an id that comes back later starts a new document.
    """
    document_id = index_tensor("document_id", document_id, "[S]", "[B, S]")
    position = torch.arange(document_id.shape[-1], device=document_id.device)
    first = torch.ones_like(document_id, dtype=torch.bool)
    first[..., 1:] = document_id[..., 1:] != document_id[..., :-1]
    return torch.where(first, position, 0).cummax(-1).values


def random_lengths(total: int, count: int, generator: torch.Generator | None = None) -> Tensor:
    """`count` document lengths, each at least 1, that add up to `total`: uniform over all such.

    Errors: ArgumentError if count > total.
    """
    total, count = integer("total", total), integer("count", count, at_least=1)
    if count > total:
        raise ArgumentError(message("more documents than tokens", expected=f"count <= {total}",
                                    got=str(count)))
    cuts = torch.randperm(total - 1, generator=generator)[: count - 1].sort().values + 1
    return torch.cat([cuts.new_zeros(1), cuts, cuts.new_full((1,), total)]).diff()


def _lengths(lengths: Tensor | Sequence[int]) -> Tensor:
    if not isinstance(lengths, Tensor):
        return torch.tensor([integer("lengths", n) for n in lengths], dtype=torch.int64)
    return index_tensor("lengths", lengths, "[num_documents]").long()
