"""Finds score mods that are a line over the keys: score + slope * (kv_idx - origin).

In: the score's node, of a graph whose rows and columns are apart, and the level of every node. Out:
whether the slope is negated, the slope (of a head) and the origin (of a row). ALiBi is one. Along a
row only the keys' positions differ, so a kernel needs one operation a score, with constants.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from flexattn.ir.graph import Node
from flexattn.ir.ops import Op
from flexattn.lower.separate import HEAD, ROWS


def sloped(root: Node, level: Mapping[Node, int]) -> tuple[bool, Node, Node] | None:
    if root.op not in (Op.ADD, Op.SUB) or root.dtype is not torch.float32:
        return None
    score, bias = root.args
    if root.op is Op.ADD and not _is(score, "score"):
        score, bias = bias, score
    if not _is(score, "score") or bias.op is not Op.MUL:
        return None
    slope, distance = sorted(bias.args, key=lambda n: level[n])
    if level[slope] != HEAD or distance.op is not Op.SUB or distance.dtype is not torch.float32:
        return None
    negative = root.op is Op.SUB
    key, origin = distance.args
    if not _is_key(key):
        key, origin, negative = origin, key, not negative
    if not _is_key(key) or level[origin] != ROWS:
        return None
    return negative, slope, origin


def _is(n: Node, name: str) -> bool:
    return n.op is Op.INPUT and n.attr == name


def _is_key(n: Node) -> bool:
    return n.op is Op.CAST and n.dtype is torch.float32 and _is(n.args[0], "kv_idx")
