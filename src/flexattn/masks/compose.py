"""Masks made of masks."""

from __future__ import annotations

from torch import Tensor

from flexattn.errors import ArgumentError, message
from flexattn.masks.arguments import Index, MaskMod


def noop_mask(b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Tensor:
    """Everything is attended."""
    return kv_idx >= 0


def and_masks(*mask_mods: MaskMod) -> MaskMod:
    """Attended where every mask attends; everything where there is none.

    Errors: ArgumentError for a mask that is no function.
    """
    first, *rest = _functions(mask_mods) or (noop_mask,)
    others = tuple(rest)

    def mask(b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Tensor:
        attended = first(b, h, q_idx, kv_idx)
        for mod in others:
            attended = attended & mod(b, h, q_idx, kv_idx)
        return attended

    return mask


def or_masks(*mask_mods: MaskMod) -> MaskMod:
    """Attended where at least one mask attends; nothing where there is none.

    Errors: ArgumentError for a mask that is no function.
    """
    first, *rest = _functions(mask_mods) or (_nothing,)
    others = tuple(rest)

    def mask(b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Tensor:
        attended = first(b, h, q_idx, kv_idx)
        for mod in others:
            attended = attended | mod(b, h, q_idx, kv_idx)
        return attended

    return mask


def _nothing(b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Tensor:
    return kv_idx < 0


def _functions(mask_mods: tuple[MaskMod, ...]) -> tuple[MaskMod, ...]:
    for mod in mask_mods:
        if not callable(mod):
            raise ArgumentError(message("a mask to compose is not a function", got=repr(mod),
                                        expected="mask_mod(b, h, q_idx, kv_idx) -> bool"))
    return mask_mods
