"""Documents packed in one sequence: masks that compare who two tokens belong to.

Documents are given by `document_id`, an integer tensor of shape [S] (the same packing for every
batch entry) or [B, S], on the device of the query. `flexattn.masks.lengths` makes it from lengths
or offsets (cu_seqlens). Ids may be any integers. Every position of the call must be covered: an
index beyond S is out of range.
"""

from __future__ import annotations

from torch import Tensor

from flexattn.errors import DeviceError, ShapeError, message
from flexattn.masks.arguments import Index, MaskMod, by_token, index_tensor, integer
from flexattn.masks.lengths import document_starts


def document(document_id: Tensor, kv_document_id: Tensor | None = None) -> MaskMod:
    """Tokens attend within their document: `document_id[q_idx] == kv_document_id[kv_idx]`.

    kv_document_id: ids of the keys where they are other tokens than the queries; the same tensor
    by default. Compose: `and_masks(causal, document(ids))` is `causal_document(ids)`.

    Source: sample packing, Krell et al. 2021, https://arxiv.org/abs/2107.02027.
    Example: `document(lengths_to_ids([300, 212, 512]))`.
    """
    query_of = by_token("document_id", document_id)
    key_of = query_of if kv_document_id is None else by_token("kv_document_id", kv_document_id)

    def mask(b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Tensor:
        return query_of(b, q_idx) == key_of(b, kv_idx)

    return mask


def causal_document(document_id: Tensor) -> MaskMod:
    """Packed causal language modelling: `kv_idx <= q_idx and id[q_idx] == id[kv_idx]`.

    The same as causal masks inside each document, for documents that are contiguous or not.
    """
    id_of = by_token("document_id", document_id)

    def mask(b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Tensor:
        return (q_idx >= kv_idx) & (id_of(b, q_idx) == id_of(b, kv_idx))

    return mask


def per_document(inner: MaskMod, document_id: Tensor) -> MaskMod:
    """`inner` inside every document, with positions counted from the document's start.

    `start[q_idx] == start[kv_idx] and inner(b, h, q_idx - start[q_idx], kv_idx - start[kv_idx])`,
    start = `document_starts(document_id)`, taken once, when this is called. A document is a run of
    equal ids.

    Example: `per_document(prefix_lm(16), ids)`: each document's first 16 tokens are its prefix.
    """
    start_of = by_token("document_id", document_starts(document_id))

    def mask(b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Tensor:
        q_start, kv_start = start_of(b, q_idx), start_of(b, kv_idx)
        return (q_start == kv_start) & inner(b, h, q_idx - q_start, kv_idx - kv_start)

    return mask


def document_prefix_lm(document_id: Tensor, prefix_length: Tensor) -> MaskMod:
    """A prefix LM in each document, with a prefix length per document.

    `document_id[q_idx] == document_id[kv_idx] and (kv_idx is in the document's prefix or
    kv_idx <= q_idx)`.

    prefix_length: integer tensor of shape [num_documents], or [B, num_documents] with ids [B, S];
    it is read at the ids, which therefore count from 0.

    Errors: DeviceError if the two tensors are on different devices.
    """
    id_of = by_token("document_id", document_id)
    lengths = index_tensor("prefix_length", prefix_length, "[num_documents]", "[B, num_documents]")
    if lengths.device != document_id.device:
        raise DeviceError(message("prefix_length and document_id are on different devices",
                                  expected=str(document_id.device), got=str(lengths.device)))
    prefix_end_of = by_token("prefix_end", _prefix_end(document_id, lengths))

    def mask(b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Tensor:
        seen = (kv_idx < prefix_end_of(b, q_idx)) | (q_idx >= kv_idx)
        return (id_of(b, q_idx) == id_of(b, kv_idx)) & seen

    return mask


def _prefix_end(document_id: Tensor, lengths: Tensor) -> Tensor:
    """For each token, the position where the prefix of its document ends."""
    if lengths.dim() == 1:
        own = lengths[document_id.long()]
    elif document_id.dim() == 2 and len(lengths) == len(document_id):
        own = lengths.gather(1, document_id.long())
    else:
        raise ShapeError(message("prefix_length per batch entry needs ids per batch entry",
                                 expected=f"document_id of shape [{len(lengths)}, S]",
                                 got=str(list(document_id.shape))))
    return document_starts(document_id) + own


def shared_prefix(branch_id: Tensor, group_id: Tensor | None = None) -> MaskMod:
    """Many continuations of one prompt in one sequence, each seeing the prompt and itself.

    `kv_idx <= q_idx and (branch_id[kv_idx] == 0 or branch_id[q_idx] == branch_id[kv_idx])`;
    with `group_id` (several prompts, each followed by its branches) also
    `group_id[q_idx] == group_id[kv_idx]`.

    branch_id, group_id: integer tensors of shape [S] or [B, S]; branch 0 is the prompt. Give each
    branch the position embeddings that follow the prompt.

    Source: Hydragen, Juravsky et al. 2024, https://arxiv.org/abs/2402.05099 (the setting).
    Example: `shared_prefix(lengths_to_ids([prompt_length, *answer_lengths]))`.
    """
    branch_of = by_token("branch_id", branch_id)
    group_of = None if group_id is None else by_token("group_id", group_id)

    def mask(b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Tensor:
        branch = branch_of(b, kv_idx)
        seen = (q_idx >= kv_idx) & ((branch == 0) | (branch_of(b, q_idx) == branch))
        return seen if group_of is None else seen & (group_of(b, q_idx) == group_of(b, kv_idx))

    return mask


def bidirectional_spans(span_id: Tensor) -> MaskMod:
    """Causal, and bidirectional within spans, such as the patches of one image among text.

    `kv_idx <= q_idx or (span_id[q_idx] == span_id[kv_idx] and span_id[kv_idx] >= 0)`.

    span_id: integer tensor of shape [S] or [B, S]; negative for tokens of no span.

    Source: Transfusion, Zhou et al. 2024, https://arxiv.org/abs/2408.11039, figure 4.
    """
    span_of = by_token("span_id", span_id)

    def mask(b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Tensor:
        span = span_of(b, kv_idx)
        return (q_idx >= kv_idx) | ((span >= 0) & (span_of(b, q_idx) == span))

    return mask


def flattened_batch(inner: MaskMod, q_len: int, kv_len: int | None = None) -> MaskMod:
    """`inner` for a batch whose sequences of equal length lie one after the other in one sequence.

    Sequence i holds queries [i * q_len, (i + 1) * q_len) and keys [i * kv_len, (i + 1) * kv_len);
    `inner` is given its number as b. kv_len: q_len by default.
    """
    q_len = integer("q_len", q_len, at_least=1)
    kv_len = q_len if kv_len is None else integer("kv_len", kv_len, at_least=1)

    def mask(b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Tensor:
        sequence = q_idx // q_len
        inside = inner(sequence, h, q_idx % q_len, kv_idx % kv_len)
        return (sequence == kv_idx // kv_len) & inside

    return mask
