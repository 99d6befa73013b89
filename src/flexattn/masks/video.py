"""The two kinds of heads of sparse video generation, and text that looks at images."""

from __future__ import annotations

from torch import Tensor

from flexattn.errors import ArgumentError, ShapeError, message
from flexattn.masks.arguments import Index, MaskMod, index_tensor, integer


def spatial_head(frame_tokens: int, frames: float, prompt_tokens: int = 0,
                 attend_first_frame: bool = False) -> MaskMod:
    """A head that looks at its own and nearby frames: `|q_idx - kv_idx| < frames * frame_tokens`.

    The sequence is a prompt, then the frames. The prompt attends everything and is attended by
    everything; with `attend_first_frame` so is the first frame attended.

    frames: how far a query sees, in frames; may be a fraction (rounded down to tokens).

    Source: Sparse VideoGen, Xi et al. 2025, https://arxiv.org/abs/2502.01776.
    Errors: ArgumentError for a negative number of frames.
    """
    reach = _reach("frames", frames, integer("frame_tokens", frame_tokens, at_least=1))
    prompt = integer("prompt_tokens", prompt_tokens)
    always = prompt + frame_tokens if attend_first_frame else prompt

    def mask(b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Tensor:
        near = (q_idx - kv_idx < reach) & (kv_idx - q_idx < reach)
        return near | (q_idx < prompt) | (kv_idx < always)

    return mask


def temporal_head(frame_tokens: int, num_frames: int, frames: float,
                  prompt_tokens: int = 0) -> MaskMod:
    """A head that looks at the same place in all frames.

    `|p[q_idx] - p[kv_idx]| < frames * frame_tokens / num_frames`, where
    `p[idx] = (idx - prompt_tokens) % frame_tokens` is the place in the frame: it reads as many keys
    as a `spatial_head` of that many frames. The prompt attends and is attended by everything.

    Source: Sparse VideoGen, Xi et al. 2025, https://arxiv.org/abs/2502.01776.
    Errors: ArgumentError for a negative number of frames.
    """
    frame_tokens = integer("frame_tokens", frame_tokens, at_least=1)
    reach = _reach("frames", frames, frame_tokens) // integer("num_frames", num_frames, at_least=1)
    prompt = integer("prompt_tokens", prompt_tokens)

    def mask(b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Tensor:
        moved = (q_idx - prompt) % frame_tokens - (kv_idx - prompt) % frame_tokens
        return ((moved < reach) & (-moved < reach)) | (q_idx < prompt) | (kv_idx < prompt)

    return mask


def vision_cross_attention(intervals: Tensor, image_tokens: int) -> MaskMod:
    """Text attends the images whose interval it lies in: `start[i] <= q_idx < end[i]`.

    i = kv_idx // image_tokens is the image of a key: the keys are the tokens of image 0, 1, ...

    intervals: integer tensor of shape [num_images, 2] or [B, num_images, 2], (start, end) in text
    positions; an empty interval hides the image (padding).

    Source: Flamingo, Alayrac et al. 2022, https://arxiv.org/abs/2204.14198, section 2.1.3, where
    the interval of an image lasts from its tag to the next.
    Errors: ShapeError if the last dimension is not 2.
    """
    intervals = index_tensor("intervals", intervals, "[num_images, 2]", "[B, num_images, 2]")
    if intervals.shape[-1] != 2:
        raise ShapeError(message("an interval is a start and an end",
                                 expected="last dimension 2", got=str(list(intervals.shape))))
    image_tokens = integer("image_tokens", image_tokens, at_least=1)
    start, end = intervals.unbind(-1)
    batched = start.dim() == 2

    def mask(b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Tensor:
        image = kv_idx // image_tokens
        first = start[b, image] if batched else start[image]
        last = end[b, image] if batched else end[image]
        return (q_idx >= first) & (q_idx < last)

    return mask


def _reach(name: str, frames: float, frame_tokens: int) -> int:
    if isinstance(frames, bool) or not isinstance(frames, (int, float)) or frames < 0:
        raise ArgumentError(message(f"{name} is not a length", expected="a number >= 0",
                                    got=repr(frames)))
    return int(frames * frame_tokens)
